from .budget import Budget as Budget
from .make_plan import make_plan as make_plan
from .policies import POLICIES as POLICIES
from .policies import Planner as Planner
