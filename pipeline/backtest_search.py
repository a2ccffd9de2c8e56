"""Search for a recipe by optuna (Akiba 2019): meta-training on the fit part, judged by its own validation users.

The users that a backtest of the same file and phase judges are not looked at, so that it stays honest afterwards.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from models.recipe import DEFAULT, RANGES, Recipe
from pipeline import backtest_model
from pipeline.backtest import Request, Scene, scene_of
from pipeline.protocols import cut_stream
from pipeline.recipes import recipe_path, write_recipe
from pipeline.settings import Settings
from pipeline.stages import stages
from pipeline.support import Ints
from schemas.errors import ConfigurationError

_LINEAR = frozenset(name for name in RANGES if name.endswith("_decay"))


class SearchUnavailable(ConfigurationError):
    """optuna is not installed, or the search of this name was begun on other data: do what the message says."""


@dataclass(frozen=True)
class Found:
    """The best recipe so far, what it reaches on validation users beside the defaults, and where it is kept."""

    recipe: Recipe
    path: Path
    figure: float
    default_figure: float
    trials: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.__dict__, "recipe": self.recipe.values(), "path": str(self.path)}

    def as_text(self) -> str:
        """A few lines for people."""
        changed = [f"  {name} = {value:.4g}" for name, value in self.recipe.values().items() if value != _default(name)]
        return "\n".join(
            [
                f"after {self.trials} trials: set nDCG@10 of validation users {self.figure:.4f} "
                f"(defaults {self.default_figure:.4f})",
                *(changed or ["  the defaults are the best so far"]),
                f"kept as {self.path}; use it: innerloop meta-train FILE --recipe {self.path.stem}",
                "Chosen as the best of many, the figure flatters: innerloop backtest DATA --recipe judges it.",
            ]
        )


def search(settings: Settings, request: Request, *, name: str, trials: int) -> Found:
    """Try recipes until `trials` are done in all, those of earlier runs under the same name included."""
    if find_spec("optuna") is None:
        raise SearchUnavailable("search needs optuna: pip install 'innerloop[search]'")
    import optuna

    path = recipe_path(settings.home, name)
    torch.set_num_threads(settings.torch_threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with stages() as progress:
        scene = scene_of(settings, request, progress)
        fit = cut_stream(scene.log, request.phase).fit
        study = _study(settings.home, name, _fingerprint(scene, fit), request.seed)

        def objective(trial: optuna.Trial) -> float:
            values = {one: trial.suggest_float(one, *RANGES[one], log=one not in _LINEAR) for one in RANGES}
            recipe = Recipe.of(values)
            model = backtest_model.train(
                scene.log,
                fit,
                scene.embeddings,
                encoder=scene.encoder.name,
                seed=request.seed,
                tell=lambda *_: None,
                recipe=recipe,
            )
            return _figure(model.report)

        done = len(_finished(study))
        progress("trials", done, max(trials, done))
        while len(_finished(study)) < trials:
            study.optimize(objective, n_trials=1)
            done = len(_finished(study))
            progress("trials", done, trials)
            _keep(study, path, request)
    return _keep(study, path, request)


def _study(home: Path, name: str, fingerprint: str, seed: int) -> Any:
    """The study of this name, made where there is none; its first trial are the defaults."""
    import optuna

    folder = home / "search"
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=name,
        storage=f"sqlite:///{folder / name}.sqlite",
        direction="maximize",
        load_if_exists=True,
    )
    known = study.user_attrs.get("data")
    if known not in (None, fingerprint):
        raise SearchUnavailable(f"the search {name!r} was begun on other events: give another --name")
    if known is None:
        study.set_user_attr("data", fingerprint)
        study.enqueue_trial(DEFAULT.values())
    # the same seed again would draw the same trials again
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _finished(study: Any) -> list[Any]:
    return [trial for trial in study.trials if trial.state.is_finished()]


def _keep(study: Any, path: Path, request: Request) -> Found:
    """Write the best recipe so far."""
    finished = _finished(study)
    recipe = Recipe.of(study.best_trial.params)
    found = Found(recipe, path, float(study.best_value), float(finished[0].value), len(finished))
    comments = [
        f"innerloop search {Path(request.data).name}: best of {found.trials} trials",
        "by set nDCG@10 of validation users:",
        f"{found.figure:.5f} against {found.default_figure:.5f} of the defaults",
    ]
    write_recipe(path, recipe.values(), comments)
    return found


def _figure(report: dict[str, Any]) -> float:
    """Set nDCG@10 that validation users got: the start's, and what the inner step added where it is on."""
    if "start_set_ndcg" not in report:
        raise SearchUnavailable("there are too few validation users to choose by: give a larger file")
    earned = report["gain_of_inner_step"][0] if str(report["inner_step"]) == "on" else 0.0
    return float(report["start_set_ndcg"][0] + earned)


def _default(name: str) -> float:
    return DEFAULT.values()[name]


def _fingerprint(scene: Scene, fit: Ints) -> str:
    """What the trials were judged on: other events make other figures."""
    columns = (scene.log.users[fit], scene.log.items[fit], scene.log.times[fit])
    return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()[:16]
