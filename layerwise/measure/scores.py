"""`Scores`: columns beside the layer table, one value per layer, each with its unit and direction."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from layerwise.errors import BadData, BadOption, UnknownName
from layerwise.measure import scores_files
from layerwise.spec import StackSpec

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

Direction = Literal["high", "low"]


@dataclass(frozen=True)
class Column:
    """What one instrument says about every layer.

    `values` holds one number per row of the table (nan where nothing could be measured). `important`
    says which end marks a layer that matters, None for a column that ranks nothing, such as a cost.
    `outside` holds values for what is not a row: "embedding", "head".
    """

    name: str
    values: tuple[float, ...]
    unit: str
    important: Direction | None
    about: str
    outside: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))

    def ranking(self) -> list[int]:
        """Layers from least to most important; ties in order of depth, unmeasured layers last.

        Raises BadOption for a column without a direction.
        """
        if self.important is None:
            raise BadOption(f"a ranking by {self.name!r}, which has no direction",
                            expected="a column that says whether high or low means important",
                            do="rank by another column")
        sign = 1 if self.important == "high" else -1
        return sorted(range(len(self.values)),
                      key=lambda layer: (math.isnan(self.values[layer]), sign * self.values[layer], layer))


@dataclass(frozen=True)
class Scores:
    """Columns by name for the model whose table is `spec`.

    `model` is the fingerprint of table and weights ("" if unknown). `provenance` records what the values
    came from: data, tokens, seed, versions, machine.
    """

    spec: StackSpec
    columns: Mapping[str, Column]
    model: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column in self.columns.values():
            if len(column.values) != len(self.spec.rows):
                raise BadData(f"{len(column.values)} values in the column {column.name!r}",
                              expected=f"one for each of the {len(self.spec.rows)} layers",
                              do="measure the column on this model")

    def __getitem__(self, name: str) -> Column:
        """The column called `name`. Raises UnknownName with near misses."""
        if name not in self.columns:
            raise UnknownName("column", name, self.columns)
        return self.columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def ranking(self, name: str) -> list[int]:
        """Layers from least to most important by the column called `name`."""
        return self[name].ranking()

    def merge(self, other: Scores) -> Scores:
        """The columns of both; where a name is in both, `other` wins. Raises BadData for another model."""
        same_weights = not (self.model and other.model) or self.model == other.model
        if self.spec != other.spec or not same_weights:
            raise BadData("scores of two different models", expected="two measurements of one model",
                          do="merge scores that were measured on the same model")
        provenance = self.provenance
        if self.provenance != other.provenance:
            provenance = {"merged": [*_parts(self.provenance), *_parts(other.provenance)]}
        return replace(self, model=self.model or other.model, provenance=provenance,
                       columns={**self.columns, **other.columns})

    @property
    def frame(self) -> pandas.DataFrame:
        """A data frame: index `layer`, one column per instrument."""
        import pandas

        index = pandas.RangeIndex(len(self.spec.rows), name="layer")
        values = {name: column.values for name, column in self.columns.items()}
        return pandas.DataFrame(values, index=index, dtype="float64")

    # files -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write everything to one `.parquet` or `.json` file. Raises BadOption for another ending."""
        return scores_files.write(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> Scores:
        """Read what `save` wrote. Raises BadFile where the file is missing, damaged or of another kind."""
        return scores_files.read(Path(path), Scores.from_json)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        columns = {column.name: {
            "unit": column.unit, "important": column.important, "about": column.about,
            "outside": {place: _plain(value) for place, value in column.outside.items()},
            "values": [_plain(value) for value in column.values],
        } for column in self.columns.values()}
        return {"model": self.model, "provenance": self.provenance, "columns": columns,
                "spec": self.spec.to_json()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Scores:
        """The inverse of `to_json`."""
        columns = {name: Column(
            name, tuple(_float(number) for number in fields["values"]), fields["unit"], fields["important"],
            fields["about"], {place: _float(number) for place, number in fields["outside"].items()},
        ) for name, fields in value["columns"].items()}
        return Scores(StackSpec.from_json(value["spec"]), columns, value["model"], value["provenance"])

    # views -------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """An aligned table folded to the terminal's width: names, units, directions, one line per layer."""
        return "\n\n".join(_block(columns) for columns in self._folded(shutil.get_terminal_size().columns))

    def _folded(self, width: int) -> list[list[list[str]]]:
        """Columns of equally long cells, split into blocks that fit `width`."""
        outside = sorted({place for column in self.columns.values() for place in column.outside})
        layers = [str(layer) for layer in range(len(self.spec.rows))]
        index = _aligned(["layer", "", "", *layers, *outside])
        blocks = [[index]]
        for name, column in self.columns.items():
            direction = f"{column.important} matters" if column.important else "-"
            numbers = [*column.values, *(column.outside.get(place, math.nan) for place in outside)]
            cells = _aligned([name, column.unit, direction, *(_number(value) for value in numbers)])
            if len(blocks[-1]) > 1 and sum(len(c[0]) + 2 for c in [*blocks[-1], cells]) > width:
                blocks.append([index])
            blocks[-1].append(cells)
        return blocks

    def _repr_html_(self) -> str:
        frame = self.frame
        frame.columns = [f"{column.name} [{column.unit}]" for column in self.columns.values()]
        return str(frame.to_html(float_format=_number))

    def plot(self, name: str | None = None) -> Figure:
        """A bar chart per column over depth, or of the column called `name` alone.

        Raises UnknownName for a column that is not here.
        """
        from plotly.subplots import make_subplots

        columns = [self[name]] if name else list(self.columns.values())
        titles = [f"{column.name} [{column.unit}]" for column in columns]
        figure = make_subplots(rows=len(columns), cols=1, shared_xaxes=True, subplot_titles=titles)
        for place, column in enumerate(columns, start=1):
            figure.add_bar(y=column.values, x=list(range(len(column.values))), name=column.name,
                           row=place, col=1)
        figure.update_xaxes(title_text="layer", row=len(columns), col=1)
        figure.update_layout(showlegend=False, height=120 + 180 * len(columns))
        return figure


def _parts(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(provenance["merged"]) if set(provenance) == {"merged"} else [provenance]


def _plain(value: float) -> float | str | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None if math.isnan(value) else str(value)


def _float(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e12 else f"{value:.4g}"


def _aligned(cells: list[str]) -> list[str]:
    width = max(len(cell) for cell in cells)
    return [cell.rjust(width) for cell in cells]


def _block(columns: list[list[str]]) -> str:
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
