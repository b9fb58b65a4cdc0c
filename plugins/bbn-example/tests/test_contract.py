from backdoor_bench_none.testing import parametrize_contracts
from bbn_example.components import Cross, TrimLosses


@parametrize_contracts([Cross(), TrimLosses()])
def test_contract(contract): contract()  # fmt: skip
