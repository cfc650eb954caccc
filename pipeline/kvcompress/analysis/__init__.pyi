from .attention_analyzer import AttentionAnalyzer as AttentionAnalyzer
from .attention_analyzer import HeadClassification as HeadClassification
from .attention_analyzer import HeadStatistics as HeadStatistics
from .attention_analyzer import HeadType as HeadType
from .collect import collect_attention as collect_attention
