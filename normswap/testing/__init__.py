"""The contract that every method passes, for methods of other packages too."""

from normswap.testing.contract import check_method as check_method
from normswap.testing.contract import method_checks as method_checks
