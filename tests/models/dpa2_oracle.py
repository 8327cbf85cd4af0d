"""DPA-2 once more, literally: every shell padded to its size, one atom at a time, in NumPy.

Slow, and independent of the package but for the order of the arguments. Weights are those of a published
model by their names there; matrices are (in, out).
"""

from itertools import product

import numpy as np

#: Options that a published model leaves out have these values.
REPINIT = {
    "rcut": 4.5,
    "rcut_smth": 0.5,
    "nsel": 30,
    "neuron": [3, 6, 6],
    "axis_neuron": 2,
    "tebd_dim": 3,
    "tebd_input_mode": "concat",
    "activation_function": "tanh",
    "resnet_dt": False,
    "type_one_side": False,
    "use_three_body": False,
    "three_body_neuron": [2, 4],
    "three_body_sel": 25,
    "three_body_rcut": 3.5,
    "three_body_rcut_smth": 0.5,
}
REPFORMER = {
    "rcut": 3.2,
    "rcut_smth": 1.0,
    "nsel": 22,
    "nlayers": 3,
    "g1_dim": 7,
    "g2_dim": 5,
    "axis_neuron": 2,
    "direct_dist": False,
    "update_g1_has_conv": True,
    "update_g1_has_drrd": True,
    "update_g1_has_grrg": True,
    "update_g1_has_attn": True,
    "update_g2_has_g1g1": True,
    "update_g2_has_attn": True,
    "update_h2": False,
    "attn1_hidden": 3,
    "attn1_nhead": 2,
    "attn2_hidden": 4,
    "attn2_nhead": 3,
    "attn2_has_gate": False,
    "use_sqrt_nnei": True,
    "g1_out_conv": True,
    "g1_out_mlp": True,
    "activation_function": "tanh",
    "update_style": "res_avg",
    "trainable_ln": True,
    "ln_eps": 1e-5,
    "set_davg_zero": True,
}
DESCRIPTOR = {
    "concat_output_tebd": True,
    "add_tebd_to_repinit_out": False,
    "use_econf_tebd": False,
    "use_tebd_bias": False,
    "env_protection": 0.0,
    "exclude_types": [],
}
TYPE_MAP = ["O", "H", "Cu", "Ag"]
ACTIVATIONS = {"tanh": np.tanh, "silu": lambda x: x / (1 + np.exp(-x)), "linear": lambda x: x}

#: Spin-orbitals of O, H, Cu and Ag that are filled, of 118.
FILLED = [[0, 1, 2, 3, 4, 5, 7, 9], [1], [*range(28), 29], [*range(46), 61]]


def model(repinit=None, repformer=None, **descriptor) -> dict:
    """Return a model section in which every option is given."""
    return {
        "type_map": TYPE_MAP,
        "descriptor": {
            "type": "dpa2",
            "repinit": {**REPINIT, **(repinit or {})},
            "repformer": {**REPFORMER, **(repformer or {})},
            **DESCRIPTOR,
            **descriptor,
        },
        "fitting_net": {"neuron": [8, 8], "resnet_dt": True},
    }


def random_state(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights of a model by their published names."""
    rng, state, up = np.random.default_rng(seed), {}, "atomic_model.descriptor."
    d = config["descriptor"]
    c, f = d["repinit"], d["repformer"]
    t, n_types = c["tebd_dim"], len(TYPE_MAP)

    def linear(key, n_in, n_out, bias=True):
        state[f"{key}.matrix"] = rng.normal(0, n_in**-0.5, (n_in, n_out))
        if bias:
            state[f"{key}.bias"] = rng.normal(0, 0.3, n_out)

    def network(key, widths, scaled):
        for copy in ("networks", "_networks"):
            for k, (n_in, n_out) in enumerate(zip(widths, widths[1:], strict=False)):
                layer = f"{key}.{copy}.0.layers.{k}"
                linear(layer, n_in, n_out)
                if scaled and n_out in (n_in, 2 * n_in):
                    state[f"{layer}.idt"] = rng.normal(0.7, 0.2, n_out)

    def shell(key, nsel):
        std = np.repeat(rng.uniform(0.5, 1.5, (n_types, 1, 2)), [1, 3], axis=2)
        state[f"{key}.stddev"] = np.repeat(std, nsel, axis=1)
        state[f"{key}.mean"] = np.zeros((n_types, nsel, 4))
        for name in ("type_embd_data", "compress_info.0", "compress_data.0"):
            state[f"{key}.{name}"] = np.zeros(0)

    linear(
        up + "type_embedding.embedding.embedding_net.layers.0",
        118 if d["use_econf_tebd"] else n_types,
        t,
        d["use_tebd_bias"],
    )
    nets = [("repinit", c["neuron"], 1 if c["type_one_side"] else 2, c["nsel"])]
    if c["use_three_body"]:
        nets.append(("repinit_three_body", c["three_body_neuron"], 2, c["three_body_sel"]))
    for name, widths, n, nsel in nets:
        shell(up + name, nsel)
        strip = c["tebd_input_mode"] == "strip"
        network(f"{up}{name}.filter_layers", [1 if strip else 1 + n * t, *widths], c["resnet_dt"])
        if strip:
            network(f"{up}{name}.filter_layers_strip", [n * t, *widths], c["resnet_dt"])
    shell(up + "repformers", f["nsel"])
    if not f["set_davg_zero"]:
        state[up + "repformers.mean"][:, :, 0] = rng.uniform(0.2, 0.5, (n_types, 1))
    for name in ("type_embd_data", "compress_info.0", "compress_data.0"):
        del state[f"{up}repformers.{name}"]
    n_out = c["neuron"][-1] * c["axis_neuron"] + c["use_three_body"] * c["three_body_neuron"][-1]
    g1, g2 = f["g1_dim"], f["g2_dim"]
    if n_out != g1:
        linear(up + "g1_shape_tranform", n_out, g1, bias=False)
    if d["add_tebd_to_repinit_out"]:
        linear(up + "tebd_transform", t, g1, bias=False)
    linear(up + "repformers.g2_embd", 1, g2)
    for i in range(f["nlayers"]):
        _layer_state(f"{up}repformers.layers.{i}.", f, i + 1 == f["nlayers"], linear, state, rng)
    widths = [g1 + d["concat_output_tebd"] * t, *config["fitting_net"]["neuron"], 1]
    network("atomic_model.fitting_net.filter_layers", widths, True)
    for key in [k for k in state if k.startswith("atomic_model.fitting_net") and "layers.2.idt" in k]:
        del state[key]
    state["atomic_model.fitting_net.bias_atom_e"] = np.zeros((n_types, 1))
    state["atomic_model.out_bias"] = rng.normal(size=(1, n_types, 1))
    return state


def _layer_state(key, f, last, linear, state, rng):
    g1, g2, ax = f["g1_dim"], f["g2_dim"], f["axis_neuron"]
    conv, outside = f["update_g1_has_conv"], f["g1_out_conv"]
    mixed = (not f["g1_out_mlp"]) * g1 + (conv and not outside) * g2
    mixed += ax * (f["update_g1_has_grrg"] * g2 + f["update_g1_has_drrd"] * g1)
    linear(key + "linear1", mixed, g1)
    counts = {"g1": (g1, 1 + f["g1_out_mlp"] + (conv and outside) + f["update_g1_has_attn"])}
    if f["g1_out_mlp"]:
        linear(key + "g1_self_mlp", g1, g1)
    if conv:
        linear(key + "proj_g1g2", *((g2, g1) if outside else (g1, g2)), bias=False)
    if f["update_g1_has_attn"]:
        d, h = f["attn1_hidden"], f["attn1_nhead"]
        linear(key + "loc_attn.mapq", g1, d * h, bias=False)
        linear(key + "loc_attn.mapkv", g1, (d + g1) * h, bias=False)
        linear(key + "loc_attn.head_map", h * g1, g1)
    if not last:
        d, h = f["attn2_hidden"], f["attn2_nhead"]
        linear(key + "linear2", g2, g2)
        counts["g2"] = (g2, 1 + f["update_g2_has_g1g1"] + f["update_g2_has_attn"])
        if f["update_g2_has_g1g1"]:
            linear(key + "proj_g1g1g2", g1, g2, bias=False)
        if f["update_g2_has_attn"] or f["update_h2"]:
            linear(key + "attn2g_map.mapqk", g2, d * 2 * h, bias=False)
        if f["update_g2_has_attn"]:
            linear(key + "attn2_mh_apply.mapv", g2, g2 * h, bias=False)
            linear(key + "attn2_mh_apply.head_map", g2 * h, g2)
            state[key + "attn2_lm.matrix"] = rng.normal(1, 0.2, g2)
            state[key + "attn2_lm.bias"] = rng.normal(0, 0.2, g2)
        if f["update_h2"]:
            linear(key + "attn2_ev_apply.head_map", h, 1, bias=False)
            counts["h2"] = (1, 1)
    if f["update_style"] == "res_residual":
        for name, (width, n) in counts.items():
            for k in range(n):
                state[f"{key}{name}_residual.{k}"] = rng.normal(0, 0.5, width)


class Oracle:
    """Descriptors and energies of the atoms of one structure.

    Args:
        config: a model section with every option.
        state: weights by their published names.
        types: type of every atom.
        positions: ``[n, 3]``.
        cell: ``[3, 3]``, or None.
        pbc: of the three axes.
    """

    def __init__(self, config, state, types, positions, cell=None, pbc=(False,) * 3):
        self.d, self.state, self.types, self.x = config["descriptor"], state, types, positions
        self.c, self.f = self.d["repinit"], self.d["repformer"]
        self.up = "atomic_model.descriptor."
        self.images = [np.zeros(3)]
        if cell is not None:
            ranges = [range(-4, 5) if periodic else (0,) for periodic in pbc]
            self.images = [np.array(n) @ cell for n in product(*ranges)]
        self.tebd = self.type_embedding()

    def linear(self, key, x):
        y = x @ self.state[f"{key}.matrix"]
        return y + self.state[f"{key}.bias"] if f"{key}.bias" in self.state else y

    def network(self, key, x, act):
        k = 0
        while f"{key}._networks.0.layers.{k}.matrix" in self.state:
            layer = f"{key}._networks.0.layers.{k}"
            y = act(self.linear(layer, x))
            y = y * self.state.get(f"{layer}.idt", 1.0)
            if y.shape[-1] == x.shape[-1]:
                y = y + x
            elif y.shape[-1] == 2 * x.shape[-1]:
                y = y + np.concatenate([x, x], axis=-1)
            x, k = y, k + 1
        return x

    def type_embedding(self):
        x = np.eye(len(TYPE_MAP))
        if self.d["use_econf_tebd"]:
            x = np.full((len(TYPE_MAP), 118), -1.0)
            for row, filled in zip(x, FILLED, strict=True):
                row[filled] = 1
            x = x / np.sqrt(118)
        y = self.linear(self.up + "type_embedding.embedding.embedding_net.layers.0", x)
        if y.shape == x.shape:
            y = y + x
        elif y.shape[1] == 2 * x.shape[1]:
            y = y + np.concatenate([x, x], axis=1)
        return y

    def shell(self, i, name, rcut, smooth, nsel, direct=False):
        """Return slots of atom i: neighbour (-1 = empty), switch, R, all padded to nsel."""
        found = sorted(
            (np.linalg.norm(self.x[j] + t - self.x[i]), k, j, tuple(self.x[j] + t - self.x[i]))
            for k, t in enumerate(self.images)
            for j in range(len(self.x))
            if 1e-6 < np.linalg.norm(self.x[j] + t - self.x[i]) < rcut
        )[:nsel]
        neighbour, switch = np.full(nsel, -1), np.zeros(nsel)
        mean, std = (self.state[f"{self.up}{name}.{key}"][self.types[i]] for key in ("mean", "stddev"))
        r = np.zeros((nsel, 4)) if direct else -mean / std
        for slot, (distance, _, j, vector) in enumerate(found):
            pair = [self.types[i], self.types[j]]
            if pair in self.d["exclude_types"] or pair[::-1] in self.d["exclude_types"]:
                continue
            u = min(max((distance - smooth) / (rcut - smooth), 0), 1)
            s, shifted = u**3 * (-6 * u**2 + 15 * u - 10) + 1, distance + self.d["env_protection"]
            neighbour[slot], switch[slot] = j, s
            row = s * np.array([1 / shifted, *(np.array(vector) / shifted**2)])
            r[slot] = (row - mean[slot]) / std[slot]
            if direct:
                r[slot] = np.array([distance, *vector]) / rcut
        return neighbour, switch, r

    def element_net(self, name, x, switch, elements):
        """Embedding network of one number with the embeddings of one or two elements."""
        act, key = ACTIVATIONS[self.c["activation_function"]], f"{self.up}{name}.filter_layers"
        if self.c["tebd_input_mode"] == "concat":
            return self.network(key, np.concatenate([[x], *elements]), act)
        own = self.network(key, np.array([x]), act)
        return own + own * switch * self.network(f"{key}_strip", np.concatenate(elements), act)

    def repinit(self, i):
        c = self.c
        neighbour, switch, r = self.shell(i, "repinit", c["rcut"], c["rcut_smth"], c["nsel"])
        m = np.zeros((4, c["neuron"][-1]))
        for j, s, row in zip(neighbour, switch, r, strict=True):
            if j >= 0:
                elements = [self.tebd[self.types[j]]]
                if not c["type_one_side"]:
                    elements.append(self.tebd[self.types[i]])
                m += np.outer(row, self.element_net("repinit", row[0], s, elements)) / c["nsel"]
        out = [(m.T @ m[:, : c["axis_neuron"]]).flatten()]
        if c["use_three_body"]:
            name, n = "repinit_three_body", c["three_body_sel"]
            near = self.shell(i, name, c["three_body_rcut"], c["three_body_rcut_smth"], n)
            total = np.zeros(c["three_body_neuron"][-1])
            for (j, sj, rj), (k, sk, rk) in product(zip(*near, strict=True), repeat=2):
                if j >= 0 and k >= 0:
                    cosine = rj[1:] @ rk[1:]
                    elements = [self.tebd[self.types[a]] for a in (j, k)]
                    total += cosine * self.element_net(name, cosine, sj * sk, elements) / n**2
            out.append(total)
        g1 = np.concatenate(out)
        if f"{self.up}g1_shape_tranform.matrix" in self.state:
            g1 = self.linear(self.up + "g1_shape_tranform", g1)
        if self.d["add_tebd_to_repinit_out"]:
            g1 = g1 + self.linear(self.up + "tebd_transform", self.tebd[self.types[i]])
        return g1

    def update(self, x, updates, key):
        style, n = self.f["update_style"], len(updates)
        if style == "res_avg":
            return (x + sum(updates)) / np.sqrt(n + 1)
        if style == "res_incr":
            return x + sum(updates) / np.sqrt(n)
        return x + sum(self.state[f"{key}.{k}"] * u for k, u in enumerate(updates))

    def symmetrised(self, switch, h, g):
        nsel = self.f["nsel"]
        s = sum(switch[k] * np.outer(h[k], g[k]) for k in range(nsel))
        s = s / (np.sqrt(nsel) if self.f["use_sqrt_nnei"] else nsel)
        return (s[:, : self.f["axis_neuron"]].T @ s / 3).flatten()

    def atom(self, key, g1, gg1, switch, g2, h2):
        """Return the new g1 of one atom from its own and its neighbours' (zero in empty slots)."""
        f, act = self.f, ACTIVATIONS[self.f["activation_function"]]
        updates, mixed, n = [], [], f["nsel"]
        if f["g1_out_mlp"]:
            updates.append(act(self.linear(key + "g1_self_mlp", g1)))
        else:
            mixed.append(g1)
        if f["update_g1_has_conv"] and f["g1_out_conv"]:
            updates.append((switch[:, None] * gg1 * self.linear(key + "proj_g1g2", g2)).sum(0) / n)
        elif f["update_g1_has_conv"]:
            mixed.append((switch[:, None] * self.linear(key + "proj_g1g2", gg1) * g2).sum(0) / n)
        if f["update_g1_has_grrg"]:
            mixed.append(self.symmetrised(switch, h2, g2))
        if f["update_g1_has_drrd"]:
            mixed.append(self.symmetrised(switch, h2, gg1))
        updates.append(act(self.linear(key + "linear1", np.concatenate(mixed))))
        if f["update_g1_has_attn"]:
            d, heads, c = f["attn1_hidden"], f["attn1_nhead"], f["g1_dim"]
            q = self.linear(key + "loc_attn.mapq", g1).reshape(d, heads)
            kv = self.linear(key + "loc_attn.mapkv", gg1).reshape(n, d + c, heads)
            out = []
            for a in range(heads):
                w = kv[:, :d, a] @ q[:, a] / np.sqrt(d)
                w = np.exp((w + 20) * switch - 20)
                out.append((w / w.sum() * switch) @ kv[:, d:, a])
            updates.append(self.linear(key + "loc_attn.head_map", np.concatenate(out)))
        return self.update(g1, updates, key + "g1_residual")

    def edges(self, key, g1, gg1, switch, g2, h2):
        """Return the new g2 and h2 in the slots of one atom."""
        f, act = self.f, ACTIVATIONS[self.f["activation_function"]]
        n, d, heads = f["nsel"], f["attn2_hidden"], f["attn2_nhead"]
        updates = [act(self.linear(key + "linear2", g2))]
        if f["update_g2_has_g1g1"]:
            updates.append(self.linear(key + "proj_g1g1g2", switch[:, None] * g1 * gg1))
        new_h2, weights = h2, []
        if f["update_g2_has_attn"] or f["update_h2"]:
            qk = self.linear(key + "attn2g_map.mapqk", g2).reshape(n, d, 2 * heads)
            hh, ss = h2 @ h2.T, np.outer(switch, switch)
            for a in range(heads):
                w = qk[:, :, a] @ qk[:, :, heads + a].T / np.sqrt(d)
                w = np.exp((w * (hh if f["attn2_has_gate"] else 1) + 20) * ss - 20)
                weights.append(w / w.sum(1, keepdims=True) * ss * hh / np.sqrt(3))
        if f["update_g2_has_attn"]:
            v = self.linear(key + "attn2_mh_apply.mapv", g2).reshape(n, f["g2_dim"], heads)
            o = np.stack([weights[a] @ v[:, :, a] for a in range(heads)], axis=2).reshape(n, -1)
            o = self.linear(key + "attn2_mh_apply.head_map", o)
            o = (o - o.mean(1, keepdims=True)) / np.sqrt(o.var(1, keepdims=True) + f["ln_eps"])
            updates.append(o * self.state[key + "attn2_lm.matrix"] + self.state[key + "attn2_lm.bias"])
        if f["update_h2"]:
            head_map = self.state[key + "attn2_ev_apply.head_map.matrix"][:, 0]
            moved = sum(m * w @ h2 for m, w in zip(head_map, weights, strict=True))
            new_h2 = self.update(h2, [moved], key + "h2_residual")
        return self.update(g2, updates, key + "g2_residual"), new_h2

    def descriptors(self):
        f, n = self.f, len(self.x)
        act = ACTIVATIONS[f["activation_function"]]
        g1 = act(np.stack([self.repinit(i) for i in range(n)]))
        shells = [
            self.shell(i, "repformers", f["rcut"], f["rcut_smth"], f["nsel"], f["direct_dist"])
            for i in range(n)
        ]
        g2 = [act(self.linear(self.up + "repformers.g2_embd", r[:, :1])) for _, _, r in shells]
        h2 = [r[:, 1:] for _, _, r in shells]
        for layer in range(f["nlayers"]):
            key = f"{self.up}repformers.layers.{layer}."
            gg1 = [g1[j] * (j >= 0)[:, None] for j, _, _ in shells]
            new = [self.atom(key, g1[i], gg1[i], shells[i][1], g2[i], h2[i]) for i in range(n)]
            if layer + 1 < f["nlayers"]:
                for i in range(n):
                    g2[i], h2[i] = self.edges(key, g1[i], gg1[i], shells[i][1], g2[i], h2[i])
            g1 = np.stack(new)
        if self.d["concat_output_tebd"]:
            g1 = np.concatenate([g1, self.tebd[self.types]], axis=1)
        return g1

    def energies(self):
        """Return ``[n]`` energies of the atoms, without their bias."""
        x, key = self.descriptors(), "atomic_model.fitting_net.filter_layers._networks.0.layers"
        for k in (0, 1):
            y = np.tanh(self.linear(f"{key}.{k}", x)) * self.state.get(f"{key}.{k}.idt", 1.0)
            if y.shape[1] == x.shape[1]:
                y = y + x
            elif y.shape[1] == 2 * x.shape[1]:
                y = y + np.concatenate([x, x], axis=1)
            x = y
        bias = self.state["atomic_model.out_bias"][0, self.types, 0]
        return self.linear(f"{key}.2", x)[:, 0] + bias
