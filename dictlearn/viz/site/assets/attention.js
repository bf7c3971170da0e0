// Attention of one item: rows of a layer's pattern, unpacked when the layer is first chosen.
"use strict";
(() => {
  const layers = new Map();

  View.attention = async (position, layer) => {
    const key = `${position}-${layer}`;
    if (!layers.has(key)) {
      if (layers.size > 12) layers.delete(layers.keys().next().value);
      layers.set(key, read(key).catch((error) => { layers.delete(key); throw error; }));
    }
    return layers.get(key);
  };

  async function read(key) {
    const packed = await View.load(`attention/${key}`);
    const [heads, queries, keys] = packed.shape;
    const [codes, tops] = await Promise.all([View.unpack(packed.data), View.unpack(packed.top).then(View.words16)]);
    const one = (head, query) => {
      const at = head * queries + query, top = tops[at] / 65534;
      const out = new Float64Array(keys);
      for (let k = 0; k < keys; k++) out[k] = top * (codes[at * keys + k] / packed.levels) ** 2;
      return out;
    };
    return {
      heads, queries, keys,
      // probabilities of one query; head "mean" averages over heads
      row(head, query) {
        if (head !== "mean") return one(Number(head), query);
        const out = new Float64Array(keys);
        for (let i = 0; i < heads; i++) one(i, query).forEach((p, k) => { out[k] += p / heads; });
        return out;
      },
    };
  }
})();
