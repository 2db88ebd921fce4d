"""The card of a model: what it was trained on, how well it did, what may be done with it. No case is named in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ukbob_seg import __version__
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import read_json
from ukbob_seg.training.checkpoint import IMPORTED, NAMES, ModelDescription
from ukbob_seg.training.finetune import RECORD
from ukbob_seg.training.setup import DESCRIPTION

CARD_VERSION = 1
CITATION = (
    "Emmanuelle Bourigault, Amir Jamaludin, Abdullah Hamdi: UKBOB: One Billion MRI Labeled Masks for Generalizable 3D "
    "Medical Image Segmentation, ICCV 2025"
)
ABOUT_DATA = ("description", "reference", "licence", "license", "release")  # of dataset.json, where it has them
LISTS_OF_CASES = ("dataset", "training", "test")  # of dataset.json: names and paths, which stay at home
NOT_STATED = "not stated"


def public_dataset(content: Mapping[str, Any]) -> dict[str, Any]:
    """dataset.json without lists of cases; prediction does not need them."""
    return {key: value for key, value in content.items() if key not in LISTS_OF_CASES}


def fold_facts(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a fold: cases, recipe, epochs, Dice of the validation. Null for what is not.

    Args:
        folder: ``fold_K``; of an imported model, what its archive said is passed on.
        content: of its checkpoint.

    Raises:
        DatasetError: a file in the folder is no JSON.
    """
    imported = _optional(folder / IMPORTED)
    if imported is not None and isinstance(imported.get("facts"), dict):
        return {key: value for key, value in imported["facts"].items() if key not in ("onnx", "monai")}
    run = _optional(folder / DESCRIPTION) or {}
    cases = run.pop("cases", None)
    ended = run.pop("ended", None)
    pretrained = _optional(folder / RECORD)
    started = None
    if pretrained is not None:  # the name of the file, not where it lay
        started = {"file": PurePath(str(pretrained.get("file", ""))).name, "share": pretrained.get("share")}
    best = content.get("best_dice")
    return {
        "training_cases": None if cases is None else len(cases),
        "epochs": content.get("epoch"),
        "best_patch_dice": best if isinstance(best, float) and best >= 0 else None,
        "recipe": run or None,
        "ended": ended,
        "started_from": started,
        "validation": _validation(folder / "validation" / "summary.json", folder.name != "fold_all"),
    }


def _validation(path: Path, is_held_out: bool) -> dict[str, Any] | None:
    """Dice per class, over cases, of a fold's final validation; without the cases themselves."""
    content = _optional(path)
    if content is None:
        return None
    try:
        dice = {name: {k: entry["dice"][k] for k in ("mean", "sd", "n")} for name, entry in content["classes"].items()}
        return {"held_out": is_held_out, "cases": content["cases"], "dice": dice}
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path} is no summary of ukbob_evaluate; remove it, or validate that fold again") from error


def pooled_dice(folds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean Dice of each class over the held-out cases of all folds, and how many cases that were."""
    sums: dict[str, list[float]] = {}
    for facts in folds.values():
        validation = facts.get("validation")
        if not validation or not validation["held_out"]:
            continue
        for name, entry in validation["dice"].items():
            total = sums.setdefault(name, [0.0, 0])
            if entry["n"]:
                total[0] += entry["mean"] * entry["n"]
                total[1] += entry["n"]
    return {name: {"mean": total / n if n else None, "n": int(n)} for name, (total, n) in sums.items()}


def model_facts(
    description: ModelDescription, checkpoint: str, parameters: int, folds: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One model of the card.

    Args:
        description: of its folds.
        checkpoint: ``best`` or ``final``, of all folds.
        parameters: of its network.
        folds: ``fold_facts`` by fold.
    """
    plans = description.parsed_plans()
    plan = plans.configuration(description.configuration)
    network = plan.network(description.network)
    return {
        "configuration": description.configuration,
        "network": description.network,
        "arguments": description.arguments,
        "parameters": parameters,
        "patch_size": list(network.patch_size),
        "spacing_mm": list(plan.spacing_mm),
        "first_stage": plan.previous_stage,
        "normalization": [scheme.scheme for scheme in plans.normalization],
        "head": description.head,
        "mirror_axes": list(description.mirror_axes),
        "checkpoint": checkpoint,
        "folds": dict(folds),
        "dice_per_class": pooled_dice(folds),
    }


def make_card(
    spec: DatasetSpec, models: Mapping[str, Mapping[str, Any]], licence: str | None, citation: str | None
) -> dict[str, Any]:
    """The whole card; the first of the models is the one that is meant, the others are its first stages."""
    labels = spec.labels
    return {
        "card_version": CARD_VERSION,
        "ukbob_seg": __version__,
        "name": f"{spec.name}, {next(iter(models))}",
        "licence": licence,
        "citation": [CITATION, *([citation] if citation else [])],
        "data": {
            "dataset": spec.name,
            "channels": list(spec.channel_names),
            "labels": {name: list(values) for name, values in zip(labels.names, labels.members, strict=True)},
            "regions": labels.has_regions,
            "cases": spec.content.get("numTraining"),
            "file_ending": spec.file_ending,
            **{key: spec.content[key] for key in ABOUT_DATA if key in spec.content},
        },
        "models": dict(models),
    }


def readme(card: Mapping[str, Any]) -> str:
    """The card for people, in Markdown."""
    data, models = card["data"], card["models"]
    name, main = next(iter(models.items()))
    about = {"licence": "licence of the data", "license": "licence of the data"}
    lines = [
        f"# {card['name']}",
        "",
        f"A segmentation model of ukbob_seg {card['ukbob_seg']}. For research; not a medical device.",
        "",
        f"- licence of the weights: {card['licence'] or NOT_STATED}",
        f"- channels: {', '.join(data['channels'])}",
        f"- labels: {', '.join(data['labels'])}",
        f"- cases in the data set: {_known(data['cases'])}",
        *(f"- {about.get(key, key)}: {data[key]}" for key in ABOUT_DATA if key in data),
        "",
        "## Use",
        "",
        "    ukbob_import_model THIS_FILE.zip",
        f"    {predict_command(data['dataset'], main['configuration'], main['network'], main['checkpoint'])}",
        "",
    ]
    for title, model in models.items():
        lines += _model_lines(title, model, title == name)
    lines += ["## Citation", "", *(f"- {entry}" for entry in card["citation"]), ""]
    return "\n".join(lines)


def predict_command(dataset: str, configuration: str, network: str, checkpoint: str) -> str:
    """How an imported model predicts."""
    number = int(dataset[len("Dataset") :].split("_")[0])
    final = " --checkpoint final" if checkpoint == "final" else ""
    return f"ukbob_predict -d {number} -c {configuration} --network {network}{final} -i IMAGES -o PREDICTIONS"


def check_card(card: Any) -> None:
    """Refuse a card of others that this version could not write again.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, IndexError: it has another form.
    """
    readme(card)
    for model in card["models"].values():
        pooled_dice(model["folds"])
    if not isinstance(card["licence"], str | None):
        raise TypeError("licence is no text")


def _model_lines(title: str, model: Mapping[str, Any], is_main: bool) -> Sequence[str]:
    lines = [
        f"## {title}" + ("" if is_main else " (first stage)"),
        "",
        f"{model['network']} of {model['parameters']:,} parameters; patch {_sizes(model['patch_size'])} voxels at "
        f"{_sizes(model['spacing_mm'])} mm (z, y, x); {NAMES[model['checkpoint']]} of fold "
        f"{', '.join(model['folds'])}.",
        "",
        "| fold | training cases | epochs | started from | ONNX: largest difference | MONAI: largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for fold, facts in model["folds"].items():
        started = facts["started_from"]["file"] if facts.get("started_from") else "fresh weights"
        differences = [_difference(facts.get(key)) for key in ("onnx", "monai")]
        cells = [fold, _known(facts["training_cases"]), _known(facts["epochs"]), started, *differences]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    dice = model["dice_per_class"]
    if not dice:
        return [*lines, "Dice per class: not known; no fold has a validation of held-out cases.", ""]
    lines += [f"Dice of held-out cases, as {NAMES['best']} of each fold predicts them:", "", "| class | Dice | cases |",
              "|---|---|---|"]  # fmt: skip
    for label, entry in dice.items():
        mean = "-" if entry["mean"] is None else f"{entry['mean']:.3f}"
        lines.append(f"| {label} | {mean} | {entry['n']} |")
    return [*lines, ""]


def _optional(path: Path) -> dict[str, Any] | None:
    content = read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) else None


def _known(value: Any) -> str:
    return "not known" if value is None else str(value)


def _difference(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return "not compared" if entry.get("max_abs_difference") is None else f"{entry['max_abs_difference']:.1e}"


def _sizes(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
