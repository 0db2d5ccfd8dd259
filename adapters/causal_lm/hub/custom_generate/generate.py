"""`parallel_generate` in the form of a Hub repository: `model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, ...)`."""

from parallel_decode.adapters.causal_lm import parallel_generate


def generate(model, streamer=None, **arguments):  # type: ignore[no-untyped-def]
    """As `model.generate`, with the options of `parallel_generate`; `streamer` is its `stream`."""
    if streamer is not None:
        arguments["stream"] = streamer
    return model.generate(custom_generate=parallel_generate, **arguments)
