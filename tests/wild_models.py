"""Small models of the kinds that people train, by name."""

from wild_attention import ATTENTION
from wild_cnns import CNNS
from wild_sequences import SEQUENCES
from wild_tables import TABLES

WILD = {**CNNS, **SEQUENCES, **ATTENTION, **TABLES}
