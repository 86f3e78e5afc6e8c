"""What the live page shows of a model, and what it must not tell of single tokens.

The policies are pure: `shown_functions` decides what of the functions is shown and when,
`memory_time` adds up memory over time, `timeline` keeps the last events. `model_activity` applies
them to one controller; the page itself is `control/api/live_page.py`.
"""

from faasmoe_operator.control.live.model_activity import ModelActivity
from faasmoe_operator.control.live.shown_functions import PrivacySettings

__all__ = ["ModelActivity", "PrivacySettings"]
