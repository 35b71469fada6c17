"""The public names of tunekit and where each lives: the one list, for type checkers and for `__init__.py` alike."""

from .core.assets import ORDERS as ORDERS
from .core.assets import TINY as TINY
from .core.codec import Codec as Codec
from .core.component import Component as Component
from .core.component import Context as Context
from .core.hookspecs import Lazy as Lazy
from .core.hookspecs import hookimpl as hookimpl
from .core.interfaces import AdapterMethod as AdapterMethod
from .core.interfaces import DataSource as DataSource
from .core.interfaces import Encoded as Encoded
from .core.interfaces import Evaluator as Evaluator
from .core.interfaces import Example as Example
from .core.interfaces import Quantizer as Quantizer
from .core.interfaces import Trainer as Trainer
from .core.interfaces import TrainResult as TrainResult
from .core.peft_method import PeftMethod as PeftMethod
from .core.pipeline import Pipeline as Pipeline
from .core.pipeline import load as load
from .core.pipeline import open_run as open_run
from .core.plan import Plan as Plan
from .core.plugin import Plugin as Plugin
from .core.plugin import Plugins as Plugins
from .core.registry import register as register
from .core.result import Run as Run
from .core.run import RunLog as RunLog
from .errors import AmbiguousComponent as AmbiguousComponent
from .errors import ConfigError as ConfigError
from .errors import DataError as DataError
from .errors import NotSupported as NotSupported
from .errors import PluginError as PluginError
from .errors import PluginWarning as PluginWarning
from .errors import RunExists as RunExists
from .errors import TrainingError as TrainingError
from .errors import TunekitError as TunekitError
from .errors import UnknownComponent as UnknownComponent
from .plugins.adapters.lora import LoRA as LoRA
from .plugins.evaluators.exact_match import ExactMatch as ExactMatch
from .plugins.evaluators.perplexity import Perplexity as Perplexity
from .plugins.evaluators.token_accuracy import TokenAccuracy as TokenAccuracy
from .plugins.sources.in_memory import InMemory as InMemory
from .plugins.sources.json_lines import JsonLines as JsonLines
from .plugins.trainers.sft import SFT as SFT
from .plugins.trainers.transformers import Transformers as Transformers

def plugins() -> Plugins: ...
