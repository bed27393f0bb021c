"""A loaded model as lm-evaluation-harness sees one. Importing this file needs `lm_eval` and names the model "spectra".

    import spectra_jax.evaluate.adapter
    lm_eval.simple_evaluate(model="spectra", model_args="checkpoint=runs/tri", tasks=["arc_easy"])

lm-evaluation-harness has no entry points for models (0.4.13), so that its own command line does not know the name;
`spectra harness` is the command line for it.
"""

from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from spectra_jax.errors import UserError
from spectra_jax.evaluate.scoring import score
from spectra_jax.evaluate.windows import window_pairs
from spectra_jax.serve.generate import Generator
from spectra_jax.serve.load import Loaded, load

NEW_TOKENS = 256  # of a generation, where the task does not say; lm-evaluation-harness's own default
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature"}


@register_model("spectra")
class SpectraLM(TemplateLM):
    """Scores token ids by `scoring.score`; the text is cut into ids by the harness's own code and our tokenizer."""

    def __init__(self, checkpoint: str | Loaded, seed: int = 0):
        """`checkpoint` is WORKDIR[@STEP] or a loaded model; `seed` is that of sampled generations.

        Raises:
          UserError: as `load`.
        """
        super().__init__()
        self.loaded = load(checkpoint) if isinstance(checkpoint, str) else checkpoint
        self.seed = int(seed)

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token, which also stands for an empty context."""
        return self.loaded.tokenizer.eod

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self.loaded.config.data.T

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say."""
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer's cached requests from another's."""
        return self.loaded.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; no token is ever added, as in training."""
        return self.loaded.tokenizer.encode_batch([string])[0].tolist()

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        found = [tuple(one) for one in score(self.loaded, [(context, rest) for _, context, rest in requests])]
        for (texts, _, _), one in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", texts, one)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts after the end of another document, by windows that do not overlap."""
        texts, T = [request.args[0] for request in requests], self.max_length
        windows = [
            window_pairs([self.eot_token_id, *ids.tolist()], T, T) for ids in self.loaded.tokenizer.encode_batch(texts)
        ]
        scores = iter(score(self.loaded, [pair for some in windows for pair in some]))
        sums = [sum(next(scores).loglikelihood for _ in some) for some in windows]
        for text, total in zip(texts, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    @cached_property
    def generator(self) -> Generator:
        """The model that writes; it holds the weights a second time, and so is made when a task asks for it."""
        return Generator(self.loaded)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, in batches of requests with the same options.

        A prompt that leaves no room for the new tokens loses its beginning. Choices follow from the seed and the
        place of the prompt among those with the same options.

        Raises:
          UserError: an option other than `until`, `max_gen_toks`, `do_sample` and `temperature`, or no room for any
            prompt.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        found = [""] * len(requests)
        for some in groups.values():
            options, T = self._generation_options(requests[some[0]].args[1]), self.max_length
            room = T - options["max_new_tokens"]
            if room < 1:
                raise UserError(
                    f"{options['max_new_tokens']} new tokens leave no room for a prompt in the model's context of {T}; "
                    f"ask for 1 to {T - 1} (max_gen_toks in a task's generation_kwargs)"
                )
            prompts = self.loaded.tokenizer.encode_batch([requests[i].args[0] for i in some])
            prompts = [ids[-room:].tolist() or [self.eot_token_id] for ids in prompts]
            for i, completion in zip(some, self.generator.generate(prompts, **options)):
                found[i] = completion.text
                self.cache_hook.add_partial("generate_until", requests[i].args, completion.text)
        return found

    def _generation_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """A task's `generation_kwargs` as `Generator.generate` takes them."""
        sampled = given.get("do_sample", given.get("temperature", 0.0) > 0)
        unknown = sorted(set(given) - KNOWN - (set() if sampled else {"top_k", "top_p"}))
        if unknown:
            raise UserError(f"generation_kwargs.{unknown[0]}={given[unknown[0]]!r} is not known here; a task "
                            f"may set {', '.join(sorted(KNOWN))}")
        until = given.get("until") or []
        return {
            "max_new_tokens": int(given.get("max_gen_toks", NEW_TOKENS)), "seed": self.seed, "top_k": 0,
            "stop": [until] if isinstance(until, str) else until,
            "temperature": float(given.get("temperature", 1.0)) if sampled else 0.0,
        }
