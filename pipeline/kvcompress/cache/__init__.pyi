from .attention import attached as attached
from .choices import Choosing as Choosing
from .oracle import judged as judged
from .ragged_cache import RaggedCache as RaggedCache
from .recorded import recorded_choices as recorded_choices
from .storage import allocated_slots as allocated_slots
