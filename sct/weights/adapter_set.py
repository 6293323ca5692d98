"""Hold several fine-tuned models of one base, to switch between their adapters and to combine them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import jax

from sct.checks import check_choice
from sct.errors import ConfigError
from sct.models import adapters, classifier
from sct.models.combined_adapters import combine
from sct.nn import axes
from sct.nn.adapters import COLLECTION
from sct.nn.paths import flatten, unflatten
from sct.weights import adapter_folder
from sct.weights.pretrained import (
    ANNOTATION,
    Pretrained,
    boxed_shapes,
    fitting_rules,
    with_changed_outputs,
)

_CLASSIFIER = classifier.COLLECTION


class AdapterSet:
    """Several fine-tuned models of one base model, which share its weights and one compiled program.

    `use` returns a model in which some of the adapters are active. All these models have arrays of the same shapes, so
    each function compiles only once, whichever adapters are active. All adapters of the set are computed, even those
    that are not active, so a large set is slower.

    Parameters
    ----------
    models
        Fine-tuned models by name, such as results of `sct.tl.finetune`. All must have the same base model.

    Raises
    ------
    ConfigError
        There is no model, a model has neither adapters nor a classifier, or two models have different bases.

    Examples
    --------
    >>> base = sct.load("runs/mine")  # doctest: +SKIP
    >>> folders = {"blood": "runs/blood/adapters", "lung": "runs/lung/adapters"}
    >>> adapter_set = AdapterSet.load(base, folders)  # doctest: +SKIP
    >>> sct.tl.annotate(cells, adapter_set.use("blood"))  # doctest: +SKIP
    >>> sct.tl.embed(cells, adapter_set.use({"blood": 0.5, "lung": 0.5}, classifier=""))  # doctest: +SKIP
    """

    def __init__(self, models: Mapping[str, Pretrained]):
        if not models:
            raise ConfigError("the set of adapters is empty: give at least one fine-tuned model.")
        self._models = dict(models)
        first, *_ = self._models.values()
        base = adapter_folder.base_of(first)
        self.base = dataclasses.replace(
            base, data={name: value for name, value in base.data.items() if name != ANNOTATION}
        )
        for name, model in self._models.items():
            own = adapter_folder.base_of(model)
            if not own.variables.keys() < model.variables.keys():
                raise ConfigError(
                    f"the model {name!r} has neither adapters nor a classifier: fine-tune it first."
                )
            if not _same_base(self.base, own):
                raise ConfigError(
                    f"the model {name!r} was fine-tuned from a model with hash {own.fingerprint}, but the base of the "
                    f"first model has the hash {self.base.fingerprint}: use models with the same base model."
                )
        self._boxed = boxed_shapes(self.base.family, self.base.config)

    @classmethod
    def load(cls, model: Pretrained, folders: Mapping[str, str | os.PathLike[str]]) -> AdapterSet:
        """Load adapter folders.

        Parameters
        ----------
        model
            Base model, without adapters and classifier.
        folders
            Adapter folders by name.

        Raises
        ------
        CheckpointError
            A folder is damaged, or its adapters were trained on another model.
        ConfigError
            The model already has adapters or a classifier, or there is no folder.
        """
        made = cls({name: adapter_folder.load(model, folder) for name, folder in folders.items()})
        made.base = model
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fine-tuned models."""
        return tuple(self._models)

    def use(self, active: str | Mapping[str, float], classifier: str | None = None) -> Pretrained:
        """Return the base model with some of the adapters.

        Parameters
        ----------
        active
            Name of one fine-tuned model, or weights by name. Each adapter changes the output of its layer. The changes
            of low-rank adapters and bottlenecks are multiplied by their weights and added. Prefixes cannot be added:
            their weight is 0 or 1, and each attention layer can have only one active prefix.
        classifier
            Name of the active model whose classifier is used; "" for no classifier. Default: the classifier of
            the active models, if exactly one of them has a classifier. A classifier was trained with the adapters of
            its own model only, so check a combination on cells with known labels.

        Raises
        ------
        ConfigError
            A name is unknown, the adapters cannot be combined with these weights, or several active models have a
            classifier and none is chosen.
        """
        weights = {active: 1.0} if isinstance(active, str) else dict(active)
        for name in weights:
            check_choice("the name of the adapters", name, self.names)
        members = {
            name: model.variables[COLLECTION]
            for name, model in self._models.items()
            if model.variables.get(COLLECTION)
        }
        variables = dict(self.base.variables)
        if members:
            combined = combine(self._boxed["params"], members, weights)
            variables[COLLECTION] = self._placed(combined)
        chosen = self._classifier(weights, classifier)
        data = self.base.data
        if chosen is not None:
            variables[_CLASSIFIER] = chosen.variables[_CLASSIFIER]
            data = chosen.data
        if not any(weights.values()):
            return dataclasses.replace(self.base, variables=variables, data=data, card="")
        return with_changed_outputs(self.base, variables=variables, data=data, card="")

    def _classifier(self, weights: Mapping[str, float], asked: str | None) -> Pretrained | None:
        """Return the model whose classifier is used."""
        if asked == "":
            return None
        able = [
            name for name, weight in weights.items() if weight and _CLASSIFIER in self._models[name].variables
        ]
        if asked is not None:
            check_choice(
                "`classifier`", asked, able, advice="choose an active model with a classifier, or ''"
            )
            return self._models[asked]
        if len(able) > 1:
            raise ConfigError(
                f"the active models {', '.join(map(repr, able))} all have a classifier: choose one with "
                'classifier=NAME, or none with classifier="".'
            )
        return self._models[able[0]] if able else None

    def _placed(self, tree: Mapping[str, object]) -> dict[str, object]:
        """Return the adapters with the sharding of the layers that they adapt, if the base model is on a mesh."""
        mesh = adapter_folder.mesh_of(self.base)
        if mesh is None:
            return dict(tree)
        flat = flatten({COLLECTION: tree})
        boxed = {COLLECTION: adapters.beside(self._boxed, flat)[COLLECTION]}
        where = flatten(axes.shardings(boxed, mesh, fitting_rules(mesh, None)))
        return unflatten({path: jax.device_put(value, where[path]) for path, value in flat.items()})[
            COLLECTION
        ]


def _same_base(one: Pretrained, other: Pretrained) -> bool:
    if one.family != other.family or one.config != other.config:
        return False
    first, second = flatten(one.variables), flatten(other.variables)
    if first.keys() == second.keys() and all(value is second[path] for path, value in first.items()):
        return True  # avoids the hash, which takes long for large models
    return one.fingerprint == other.fingerprint
