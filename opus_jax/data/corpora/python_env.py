from opus_jax.config import CorpusConfig
from opus_jax.data.documents import Corpus


def load(config: CorpusConfig) -> Corpus:
    raise NotImplementedError
