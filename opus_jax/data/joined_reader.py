"""Training rows with the proxy rows behind them, for a run that trains on both: one reader, one numbering."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Int

from opus_jax.data.records import RowReader
from opus_jax.errors import UserError


class WithProxyRows(RowReader):
    """A reader of two others: the training rows, then the chosen proxy rows as the rows of one more domain of the plan.

    Rows are counted on, so that row i has example_id i. A record's domain_id stays the one of its text, not the
    place of the plan's last domain.

    Args:
      proxy_rows: which rows of the proxy split, in this order.

    Raises:
      UserError: the readers are of different corpora, or a proxy row does not exist.
    """

    def __init__(self, train: RowReader, proxy: RowReader, proxy_rows: Int[np.ndarray, " R"]):
        if train.manifest.fingerprint != proxy.manifest.fingerprint:
            raise UserError(f"{train.folder} and {proxy.folder} hold different corpora: rows of both cannot be joined")
        self.proxy_rows = np.asarray(proxy_rows, np.int64)
        if self.proxy_rows.size and not 0 <= self.proxy_rows.min() <= self.proxy_rows.max() < len(proxy):
            raise UserError(f"proxy rows {self.proxy_rows.min()} to {self.proxy_rows.max()}: there are {len(proxy)}")
        # The files are open in the two readers: nothing of theirs is opened again.
        self.folder, self.split = train.folder, train.split
        self.manifest, self.dtype = train.manifest, train.dtype
        self._train, self._proxy = train, proxy

    def __len__(self) -> int:
        return len(self._train) + len(self.proxy_rows)

    @cached_property
    def domain_rows(self) -> list[range]:
        """The rows of each domain; the proxy rows are the last."""
        return [*self._train.domain_rows, range(len(self._train), len(self))]

    @cached_property
    def row_documents(self) -> Int[np.ndarray, "rows S"]:
        """The document ids of every row's segments, -1 where there is none."""
        return np.concatenate([self._train.row_documents, self._proxy.row_documents[self.proxy_rows]])

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Records of many rows, a structured array in the order asked for.

        Raises:
          IndexError: an index is outside 0 to len - 1.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"row {wanted.min()} or {wanted.max()} of {len(self)} rows")
        behind = wanted >= len(self._train)
        records = np.empty(wanted.shape, self.dtype)
        records[~behind] = self._train.read(wanted[~behind])
        records[behind] = self._proxy.read(self.proxy_rows[wanted[behind] - len(self._train)])
        records["example_id"] = wanted
        return records

    def columns(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """As `RowReader.columns`; the domain of a proxy row is that of its text."""
        wanted = np.asarray(indices, np.int64)
        behind = wanted >= len(self._train)
        domains = np.empty(wanted.shape, np.int32)
        domains[~behind] = self._train.columns(wanted[~behind])["domain_id"]
        domains[behind] = self._proxy.columns(self.proxy_rows[wanted[behind] - len(self._train)])["domain_id"]
        documents = np.array(self.row_documents[wanted])
        return {"example_id": wanted.astype(np.int32), "domain_id": domains, "document_ids": documents}
