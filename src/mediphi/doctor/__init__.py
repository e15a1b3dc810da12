"""The doctor: does this machine work, are this model and these data learnt as they should be?"""

from mediphi.doctor.checkup import check_up

__all__ = ["check_up"]
