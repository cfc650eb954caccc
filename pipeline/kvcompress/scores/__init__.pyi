from .attention import received as received
from .choosing import best as best
from .held import Held as Held
from .history import Received as Received
from .score import Score as Score
from .table import SCORES as SCORES
from .table import make_score as make_score
