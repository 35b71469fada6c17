"""Hub: a data set of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from tunekit.core.data.row_source import RowSource
from tunekit.errors import ConfigError, DataError
from tunekit.plugins.sources.arrow import plain_rows


@attrs.frozen(kw_only=True)
class Hub(RowSource):
    """A data set of the Hugging Face Hub, or a directory of data files, through `datasets`.

    It is downloaded once and then read from the local cache, a batch at a time. Code of a data set's repository is
    never run: `datasets` 4 cannot. Where its files are CSV, `datasets` guesses types, so that "007" is a number; a
    number where a text belongs is an error here, and `Table` reads such files as they are.

    Args:
        id: the data set's name on the Hub ("openai/gsm8k"), or a local directory.
        subset: the configuration, where there are several ("main").
        revision: a branch, tag or commit; a commit makes the run repeatable.
        split: the split that is trained on; `datasets`' slices ("train[:1000]") are allowed.
        validation: the split that is held out; None leaves that to the pipeline.
        test: a split to be offered as "test".
    """

    name = "hub"
    requires = ("datasets",)

    id: str
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    validation: str | None = None
    test: str | None = None

    def splits(self) -> tuple[str, ...]:
        """The split "train", and those that are named."""
        named = {"validation": self.validation, "test": self.test}
        return ("train", *(name for name, split in named.items() if split is not None))

    def read(self, split: str) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
        """Each row and its place as `id[split]: row N`."""
        wanted = {"train": self.split, "validation": self.validation, "test": self.test}[split]
        for number, row in enumerate(plain_rows(self._open(str(wanted))), start=1):
            yield f"{self.id}[{wanted}]: row {number}", row

    def _open(self, split: str) -> Any:
        """The data set, from the cache or the Hub; what goes wrong in words that say what to do."""
        import datasets
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            return datasets.load_dataset(self.id, self.subset, revision=self.revision, split=split)
        except (ConnectionError, OSError) as error:
            name = f"{self.id}{f' ({self.subset})' if self.subset else ''}"
            if isinstance(error, GatedRepoError):
                raise DataError(f"{name}: ask for access on its page, and give your token (HF_TOKEN)") from None
            if constants.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE:
                raise DataError(
                    f"{name} is not in the local cache ({datasets.config.HF_DATASETS_CACHE}), and HF_HUB_OFFLINE is "
                    "set: load it once while online, or give a local directory"
                ) from None
            missing = isinstance(error, FileNotFoundError | RepositoryNotFoundError | RevisionNotFoundError)
            what = "there is no such data set, subset or revision" if missing else "the Hub cannot be reached"
            raise DataError(f"{name}: {what}: {_first_line(error)}") from None
        except ValueError as error:  # an unknown split or subset, a file that cannot be read, scripts
            raise ConfigError(_first_line(error), "Hub") from None
        except Exception as error:  # whatever else `datasets` and the packages below it raise
            raise DataError(f"{self.id}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
