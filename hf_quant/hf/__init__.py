"""The transformers plug-in: importing this registers ``quant_method: "hf_quant"``. All that knows transformers is here."""

from hf_quant import _autoload

_autoload.drop_proxies()

from hf_quant.formats import known_methods as known_methods  # noqa: E402  (the proxies must be gone before this)
from hf_quant.hf.adapters import merge_adapters as merge_adapters  # noqa: E402
from hf_quant.hf.config import HfQuantConfig as HfQuantConfig  # noqa: E402
from hf_quant.hf.config import taken_over as taken_over  # noqa: E402
from hf_quant.hf.kv_cache import QuantCache as QuantCache  # noqa: E402
from hf_quant.hf.loading import load as load  # noqa: E402
from hf_quant.hf.loading import plan_of as plan_of  # noqa: E402
from hf_quant.hf.loading import prepare_for_training as prepare_for_training  # noqa: E402
from hf_quant.hf.loading import take_over as take_over  # noqa: E402
from hf_quant.hf.plan import Plan as Plan  # noqa: E402
from hf_quant.hf.plan import make_plan as make_plan  # noqa: E402
from hf_quant.hf.quantizer import HfQuantQuantizer as HfQuantQuantizer  # noqa: E402
from hf_quant.hf.requantizing import refuse_requantizing as refuse_requantizing  # noqa: E402

_autoload.install()
