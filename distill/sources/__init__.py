"""Where the rows of a dataset come from: files, a generator, the teacher's rationale store.

A *source* gives `Row`s. A row is one input with its gold label, and 0..N `Answer`s of the teacher
to it.

| source            | rows                                                                      |
|-------------------|---------------------------------------------------------------------------|
| `ReleasedLayout`  | the released data of Hsieh et al. 2023: rows and raw completions          |
| `JsonLines`       | any JSON-lines files, by the names of their fields                        |
| `Tfds`            | a prepared TensorFlow dataset                                             |
| `FirstOf`         | those of the first of several sources whose files are there               |
| `WithPool`        | another source's, and unlabeled inputs for training                       |
| `WithRationales`  | another source's, with the answers of a rationale store                   |
| `Remembered`      | another source's, read once for all its tasks                             |
| `Configured`      | another source's, with what the run chose: store, then teacher filter     |

What a run may choose about all sources is bound once for the process (`bind`), from gin through
`task.bind`, else from the environment (DISTILL_DATA_DIR, ...). Sources read when they are asked for
rows, so that making one needs no data. Nothing here imports TensorFlow.
"""

from distill.sources.binding import Settings, already_bound, bind, checked, reset, settings
from distill.sources.composed import OR, FirstOf, Remembered, WithPool
from distill.sources.configuring import (
    Configured,
    configured,
    released_completions,
    repair_gains,
)
from distill.sources.declared import Field, JsonLines, Tfds
from distill.sources.jsonlines import BadLine, Line, LinesReport, read_json, read_json_lines
from distill.sources.rationales import (
    STORE_SCHEMA,
    FilterCounts,
    StoreRecord,
    WithRationales,
    filter_rows,
    input_sha256,
    read_store,
    write_store,
)
from distill.sources.released import ReleasedLayout, Repair, first_misaligned
from distill.sources.rows import (
    EOS_TEXT,
    FULL_WEIGHT,
    HOLDOUT,
    Answer,
    Row,
    Source,
    SourceReport,
    gives_labels,
    source_report,
)

__all__ = [
    "Answer",
    "BadLine",
    "Configured",
    "EOS_TEXT",
    "FULL_WEIGHT",
    "Field",
    "FilterCounts",
    "FirstOf",
    "HOLDOUT",
    "JsonLines",
    "Line",
    "LinesReport",
    "OR",
    "ReleasedLayout",
    "Remembered",
    "Repair",
    "Row",
    "STORE_SCHEMA",
    "Settings",
    "Source",
    "SourceReport",
    "StoreRecord",
    "Tfds",
    "WithPool",
    "WithRationales",
    "already_bound",
    "bind",
    "checked",
    "configured",
    "filter_rows",
    "first_misaligned",
    "gives_labels",
    "input_sha256",
    "read_json",
    "read_json_lines",
    "read_store",
    "released_completions",
    "repair_gains",
    "reset",
    "settings",
    "source_report",
    "write_store",
]
