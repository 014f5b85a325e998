"""PyTorch Geometric: graphs measured by labs that differ, the lab of each node its context.

pip install torch_geometric
python -m recipes.examples.pyg_graphs
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN, global_mean_pool

import normswap

LABS = ["oslo", "pisa", "riga"]


def graphs(count, seed):
    """Return graphs whose nodes link to their like, or not, each lab with a scale of its own."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        lab, like = (int(torch.randint(n, (), generator=draw)) for n in (len(LABS), 2))
        signs = torch.randint(2, (12,), generator=draw) * 2.0 - 1
        edges = torch.randint(12, (2, 200), generator=draw)
        same = signs[edges[0]] == signs[edges[1]]
        kept = torch.rand(200, generator=draw) < torch.where(same == bool(like), 0.3, 0.1)
        values = signs + 0.3 * torch.randn(12, generator=draw)
        x = values * (0.1, 1.0, 8.0)[lab] + (0.0, 3.0, -5.0)[lab]
        found.append(Data(x=x[:, None], edge_index=edges[:, kept], y=like, lab=lab))
    return found


class Network(nn.Module):
    """Tells the class of each graph from its nodes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.layers = GIN(1, 32, num_layers=3, norm="batch_norm")
        self.head = nn.Linear(32, 2)

    def forward(self, data):
        nodes = self.layers(self.norm(data.x), data.edge_index)
        return self.head(global_mean_pool(nodes, data.batch))


def main(folder="runs/examples/pyg_graphs"):
    """Train, save and load; return the model and its accuracy on graphs not trained on."""
    torch.manual_seed(0)
    original = Network()
    model = normswap.convert(original, "cn", contexts=LABS)
    # Messages make each row depend on several nodes; row i is node i's all the same.
    normswap.fix_rows(model, aligned=True)
    optimizer = torch.optim.AdamW(normswap.param_groups(model, lr=0.005, weight_decay=0.01))
    loader = DataLoader(graphs(600, seed=0), batch_size=32, shuffle=True)
    for _ in range(5):
        for data in loader:
            cross_entropy(model(data, context=data.lab[data.batch]), data.y).backward()
            optimizer.step(), optimizer.zero_grad()
    model.eval()
    (data,) = DataLoader(graphs(300, seed=1), batch_size=300)
    nodes = data.lab[data.batch]
    with torch.no_grad():
        score, unknown = (
            float((out.argmax(1) == data.y).float().mean())
            for out in (model(data, context=nodes), model(data))
        )
    print(f"accuracy {score:.3f}, {unknown:.3f} without the names of the labs")

    normswap.save(model, Path(folder) / "norms")
    loaded = normswap.load(original, Path(folder) / "norms").eval()
    normswap.fix_rows(loaded, aligned=True)
    torch.testing.assert_close(loaded(data, context=nodes), model(data, context=nodes))
    plain = normswap.specialize(loaded, "riga")  # for Riga alone: plain batch norms
    torch.testing.assert_close(plain(data), loaded(data, context="riga"))
    print(f"saved, loaded and specialised to {folder}")
    return model, score


if __name__ == "__main__":
    main()
