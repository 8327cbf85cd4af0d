"""DPA-3 written out with loops over atoms, edges and angles, from upstream's options and weights.

For molecules and for options of which there are no reference values; energies only.
"""

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from gnnmd.nn.type_embedding import electron_configuration_vector

REPFLOW = {
    "n_dim": 6,
    "e_dim": 8,
    "a_dim": 4,
    "nlayers": 2,
    "e_rcut": 4.0,
    "e_rcut_smth": 3.0,
    "e_sel": 12,
    "a_rcut": 2.4,
    "a_rcut_smth": 1.5,
    "a_sel": 8,
    "axis_neuron": 3,
    "a_compress_rate": 1,
    "a_compress_e_rate": 2,
    "a_compress_use_split": True,
    "n_multi_edge_message": 1,
    "update_angle": True,
    "update_style": "res_residual",
    "smooth_edge_update": True,
    "edge_init_use_dist": True,
    "use_exp_switch": True,
    "sequential_update": False,
}
DESCRIPTOR = {"use_econf_tebd": False, "use_tebd_bias": False, "concat_output_tebd": False}
DESCRIPTOR |= {"add_chg_spin_ebd": False, "exclude_types": [], "env_protection": 0.0}
UP = "atomic_model.descriptor."
FITTING = "atomic_model.fitting_net.filter_layers.networks.0.layers."


def silu(x):
    return x / (1 + np.exp(-x))


class Model:
    """A random model with some options changed; ``state`` fills itself with what is read from it."""

    def __init__(self, seed: int = 0, **options):
        self.repflow = REPFLOW | {k: v for k, v in options.items() if k in REPFLOW}
        self.descriptor = DESCRIPTOR | {k: v for k, v in options.items() if k in DESCRIPTOR}
        assert set(options) <= {*REPFLOW, *DESCRIPTOR}
        self.type_map, self.state, self.rng = ["O", "H", "C"], {}, np.random.default_rng(seed)
        self.state["atomic_model.out_bias"] = np.zeros((1, 3, 1))
        self.state["atomic_model.fitting_net.bias_atom_e"] = np.zeros((3, 1))
        self.state[UP + "repflows.mean[:,0]"] = 0.1 * self.rng.normal(size=(3, 4)) * [1, 0, 0, 0]
        self.state[UP + "repflows.stddev[:,0]"] = self.rng.uniform(0.2, 0.5, size=(3, 4))

    @property
    def config(self) -> dict:
        descriptor = {
            "type": "dpa3",
            "repflow": self.repflow,
            "activation_function": "silu",
            **self.descriptor,
        }
        fitting = {"neuron": [5], "resnet_dt": False, "activation_function": "silu"}
        return {"type_map": self.type_map, "descriptor": descriptor, "fitting_net": fitting}

    def weight(self, key: str, *shape: int):
        if key not in self.state:
            spread = 1 / np.sqrt(shape[0]) if len(shape) == 2 else 0.5
            self.state[key] = spread * self.rng.normal(size=shape)
        return self.state[key]

    def linear(self, key: str, x, n_out: int, bias: bool = True):
        y = x @ self.weight(f"{key}.matrix", len(x), n_out)
        return y + self.weight(f"{key}.bias", n_out) if bias else y

    def embed(self, key: str, vector, bias: bool = False):
        n = self.repflow["n_dim"]
        y = self.linear(f"{UP}{key}.embedding.embedding_net.layers.0", vector, n, bias)
        copies = {len(vector): 1, 2 * len(vector): 2}.get(n, 0)
        return y + np.concatenate([vector] * copies) if copies else y

    def switch(self, r, which: str):
        smooth, cut = self.repflow[f"{which}_rcut_smth"], self.repflow[f"{which}_rcut"]
        if self.repflow["use_exp_switch"]:
            return np.exp(-np.exp(20 * (r - smooth) / smooth))
        u = np.clip((r - smooth) / (cut - smooth), 0, 1)
        return 1 + u**3 * (-6 * u**2 + 15 * u - 10)

    def combine(self, key: str, x, updates):
        n = len(updates)
        if self.repflow["update_style"] == "res_avg":
            return (x + sum(updates)) / np.sqrt(n + 1)
        if self.repflow["update_style"] == "res_incr":
            return x + sum(updates) / np.sqrt(n)
        return x + sum(self.weight(f"{key}.{m}", len(x)) * u for m, u in enumerate(updates))

    def energy(self, atoms: Atoms, charge: int = 0, spin: int = 0) -> float:
        o, d, n_atoms = self.repflow, self.descriptor, len(atoms)
        types = [self.type_map.index(s) for s in atoms.symbols]
        bias = d["use_tebd_bias"]
        vectors = np.eye(3)
        if d["use_econf_tebd"]:
            vectors = [electron_configuration_vector(atomic_numbers[s]).numpy() for s in self.type_map]
        start = [self.embed("type_embedding", vectors[t], bias) for t in types]
        if d["add_chg_spin_ebd"]:
            both = [self.embed("chg_embedding", np.eye(200)[charge + 100])]
            both.append(self.embed("spin_embedding", np.eye(100)[spin]))
            system = silu(self.linear(UP + "mix_cs_mlp", np.concatenate(both), o["n_dim"]))
            start = [x + system for x in start]
        n = [silu(x) for x in start]

        x = atoms.positions
        excluded = {frozenset(pair) for pair in d["exclude_types"]}
        edges, near = [], []
        for i in range(n_atoms):
            order = sorted((j for j in range(n_atoms) if j != i), key=lambda j: np.linalg.norm(x[j] - x[i]))
            within = [j for j in order if np.linalg.norm(x[j] - x[i]) <= o["e_rcut"]][: o["e_sel"]]
            shorter = [j for j in within if np.linalg.norm(x[j] - x[i]) < o["a_rcut"]][: o["a_sel"]]
            for found, chosen in [(edges, within), (near, shorter)]:
                found += [(i, j) for j in chosen if frozenset((types[i], types[j])) not in excluded]
        mean, std = self.state[UP + "repflows.mean[:,0]"], self.state[UP + "repflows.stddev[:,0]"]
        s, h, e, unit = {}, {}, {}, {}
        for i, j in edges:
            v, r = x[j] - x[i], np.linalg.norm(x[j] - x[i])
            p = r + d["env_protection"]
            s[i, j] = self.switch(r, "e")
            matrix = (s[i, j] * np.array([1 / p, *(v / p**2)]) - mean[types[i]]) / std[types[i]]
            h[i, j], unit[i, j] = matrix[1:], v / (r + 1e-6)
            scalar = r if o["edge_init_use_dist"] else matrix[0]
            e[i, j] = self.linear(UP + "repflows.edge_embd", np.array([scalar]), o["e_dim"])
            if not o["edge_init_use_dist"]:
                e[i, j] = silu(e[i, j])
        a, w = {}, {}
        for i, j in near:
            for i2, k in near:
                if i2 == i:
                    cosine = (1 - 1e-6) * (unit[i, j] @ unit[i, k]) / np.sqrt(np.pi)
                    a[i, j, k] = self.linear(
                        UP + "repflows.angle_embd", np.array([cosine]), o["a_dim"], False
                    )
                    w[i, j, k] = np.prod([self.switch(np.linalg.norm(x[m] - x[i]), "a") for m in (j, k)])
        for layer in range(o["nlayers"]):
            n, e, a = self.layer(f"{UP}repflows.layers.{layer}.", n, e, a, s, h, w, near)
        total = 0.0
        for i in range(n_atoms):
            y = np.concatenate([n[i], start[i]]) if d["concat_output_tebd"] else n[i]
            hidden = silu(self.linear(FITTING + "0", y, 5))
            total += self.linear(FITTING + "1", hidden, 1)[0]
        return total

    def layer(self, up: str, n, e, a, s, h, w, near):
        o = self.repflow

        def edge_self(e):
            return {
                (i, j): silu(
                    self.linear(up + "edge_self_linear", np.concatenate([n[i], n[j], x]), o["e_dim"])
                )
                for (i, j), x in e.items()
            }

        def angle(name, width, e, a):
            c, out = o["a_compress_rate"], {}
            n_width = o["a_dim"] // c if c else o["n_dim"]
            e_width = o["a_compress_e_rate"] * o["a_dim"] // (2 * c) if c else o["e_dim"]

            def compressed(x, width, which):
                if c and not o["a_compress_use_split"]:
                    return self.linear(f"{up}a_compress_{which}_linear", x, width, False)
                return x[:width]

            for (i, j, k), x in a.items():
                parts = [x, compressed(n[i], n_width, "n")]
                parts += [compressed(e[i, m], e_width, "e") for m in (k, j)]
                out[i, j, k] = silu(self.linear(up + name, np.concatenate(parts), width))
            return out

        def edge_angle(e, a):
            q, out = angle("edge_angle_linear1", o["e_dim"], e, a), {}
            for i, j in e:
                reduced = np.zeros(o["e_dim"]) if o["smooth_edge_update"] else e[i, j]
                if (i, j) in near:
                    mine = [key for key in a if key[:2] == (i, j)]
                    reduced = sum(w[key] * q[key] for key in mine) / np.sqrt(o["a_sel"])
                out[i, j] = silu(self.linear(up + "edge_angle_linear2", reduced, o["e_dim"]))
            return out

        def nodes(e):
            out, heads, width = [], o["n_multi_edge_message"], o["n_dim"]
            for i in range(len(n)):
                mine = [key for key in e if key[0] == i]
                sums = [np.zeros((3, o["e_dim"])), np.zeros((3, width))]
                message = np.zeros(heads * width)
                for i_, j in mine:
                    for g, f in zip(sums, (e[i_, j], n[j]), strict=True):
                        g += s[i_, j] * np.outer(h[i_, j], f) / np.sqrt(o["e_sel"])
                    inputs = np.concatenate([n[i], n[j], e[i_, j]])
                    y = silu(self.linear(up + "node_edge_linear", inputs, heads * width))
                    message += s[i_, j] * y / o["e_sel"]
                invariants = [(g[:, : o["axis_neuron"]].T @ g / 3).ravel() for g in sums]
                updates = [silu(self.linear(up + "node_self_mlp", n[i], width))]
                updates.append(silu(self.linear(up + "node_sym_linear", np.concatenate(invariants), width)))
                updates += np.split(message, heads)
                out.append(self.combine(up + "n_residual", n[i], updates))
            return out

        def add(key, m, x, u):
            return {edge: x[edge] + self.weight(f"{up}{key}.{m}", len(x[edge])) * u[edge] for edge in x}

        if o["sequential_update"]:
            e = add("e_residual", 0, e, edge_self(e))
            if o["update_angle"]:
                a = add("a_residual", 0, a, angle("angle_self_linear", o["a_dim"], e, a))
                e = add("e_residual", 1, e, edge_angle(e, a))
            return nodes(e), e, a
        updates = [edge_self(e)] + ([edge_angle(e, a)] if o["update_angle"] else [])
        new_e = {k: self.combine(up + "e_residual", x, [u[k] for u in updates]) for k, x in e.items()}
        new_a = a
        if o["update_angle"]:
            moved = angle("angle_self_linear", o["a_dim"], e, a)
            new_a = {k: self.combine(up + "a_residual", x, [moved[k]]) for k, x in a.items()}
        return nodes(e), new_e, new_a
