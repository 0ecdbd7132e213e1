"""Which products of a kernel take the transpose of another product's result, read off Triton's IR.

Triton 3.4 to 3.7 compiles that form wrongly for sm_90: https://github.com/fla-org/flash-linear-attention/issues/640.
"""

import re
from collections import defaultdict

# What is behind these is no product's result held in registers, but a load, a number, or a sum of one.
SOURCES = ("tt.load", "tt.make_range", "tt.splat", "tt.reduce", "tt.expand_dims", "arith.constant")
OPERATION = re.compile(r'(?:%(?P<name>\w+)(?::(?P<count>\d+))? = )?"?(?P<op>[a-z_]+\.[a-z_0-9.]+)"?(?P<rest>.*)')
LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)$")
VALUE = re.compile(r"%([\w#]+)")


def transposed_products(ttir):
    """The names of tt.dot results one of whose factors comes, element by element, from the transpose of another's."""
    made_of, factors = _flow(ttir)

    def takes_transposed(factor):
        ahead, seen = [(factor, False)], set()
        while ahead:
            value, transposed = ahead.pop()
            if value in factors and transposed:
                return True
            if value not in factors and (value, transposed) not in seen:
                seen.add((value, transposed))
                ahead += [(source, transposed or turned) for source, turned in made_of[value]]
        return False

    return [product for product, pair in factors.items() if any(map(takes_transposed, pair))]


def _flow(ttir):
    """{value: [(value it is made of, whether transposed)]}, and {product: its two factors}."""
    made_of, factors = defaultdict(list), {}
    regions = []  # open ones: what they result in, and what they carry from turn to turn
    for line in ttir.splitlines():
        line = LOCATION.sub("", line.strip())
        if line.startswith("}"):
            ended = regions.pop()
            if line.endswith("{"):  # } else {, } do {
                regions.append(ended)
            continue
        found = OPERATION.match(line)
        op, results, operands, carried = "", [], [], []
        if found:
            op, results = found["op"], _results(found)
            operands = VALUE.findall(found["rest"].split(" : ")[0])
        if op in ("scf.for", "scf.while"):
            initial = found["rest"].partition("iter_args(")[2] if op == "scf.for" else found["rest"]
            pairs = re.findall(r"%(\w+) = %([\w#]+)", initial)
            carried, operands = [argument for argument, _ in pairs], [start for _, start in pairs]
            _connect(made_of, operands, results, carried)
        elif op in ("scf.yield", "scf.condition"):
            _connect(made_of, operands[op == "scf.condition" :], *regions[-1])
        elif op == "tt.dot":
            factors[results[0]] = operands[:2]
        elif op and op not in SOURCES:
            for result in results:
                made_of[result] += [(operand, op == "tt.trans") for operand in operands]
        if line.endswith("{"):
            regions.append((results, carried))
    return made_of, factors


def _connect(made_of, values, *targets):
    for names in targets:
        for name, value in zip(names, values):
            made_of[name].append((value, False))


def _results(found):
    if found["count"]:
        return [f"{found['name']}#{i}" for i in range(int(found["count"]))]
    return [found["name"]] if found["name"] else []
