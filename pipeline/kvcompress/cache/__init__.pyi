from .attention import attached as attached
from .oracle import judged as judged
from .ragged_cache import RaggedCache as RaggedCache
from .storage import allocated_slots as allocated_slots
