"""`parallel_generate` in the form of a Hub repository: `model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, ...)`."""

from transformers import StoppingCriteriaList, StopStringCriteria

from parallel_decode.adapters.causal_lm import parallel_generate


def generate(model, streamer=None, tokenizer=None, stop_strings=None, stopping_criteria=None, **arguments):  # type: ignore[no-untyped-def]
    """As `model.generate`, with the options of `parallel_generate`, for which `streamer` is `stream`, and `stop_strings` a criterion."""
    if streamer is not None:
        arguments["stream"] = streamer
    stopping_criteria = StoppingCriteriaList(stopping_criteria or ())
    if stop_strings is not None:
        stopping_criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return model.generate(custom_generate=parallel_generate, stopping_criteria=stopping_criteria, **arguments)
