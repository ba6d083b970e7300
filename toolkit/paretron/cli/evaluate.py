"""`paretron eval`: loss and perplexity of a checkpoint on a recipe's held-out texts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import typer

from paretron.cli import options as o


def evaluate(
    model: o.ModelFolder,
    recipe: o.RecipeOption,
    out: o.Out,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure MODEL's loss and perplexity on the texts that the recipe's `evaluate` names."""
    import json

    from paretron.artifacts.staging import refuse_overlap
    from paretron.cli.output import opened, say_json
    from paretron.cli.progress import Progress
    from paretron.evaluate.perplexity import evaluate_model
    from paretron.recipe import load_recipe
    from paretron.run.single import provenance_of, text_store

    refuse_overlap(out, model)
    loaded = load_recipe(recipe, overrides=set_ or ())
    checkpoint = opened(model)
    texts = dict(loaded.data)
    with ExitStack() as stack, Progress(None, quiet=quiet or as_json) as progress:
        stores: dict[str, tuple[Path, int]] = {}
        for name in loaded.evaluate.perplexity:
            store = stack.enter_context(text_store(texts[name], tokenizer=model, offline=offline))
            stores[name] = store, texts[name].seq_len
        evaluate_model(
            model,
            stores,
            settings=loaded.evaluate,
            out=out,
            provenance=provenance_of("evaluate", {"model": model}, {"evaluate": loaded.evaluate}),
            overwrite=overwrite,
            on_event=progress.of("eval"),
        )
    found = json.loads((out / "evaluation.json").read_text())
    if as_json:
        say_json(found | {"notices": list(checkpoint.notices)})
        return
    for name, numbers in found.items():
        typer.echo(
            f"{name}: loss {numbers['loss']:.4f} nats/token, perplexity "
            f"{numbers['perplexity']:.3f} over {numbers['tokens']} tokens"
        )
