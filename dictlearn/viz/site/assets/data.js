// Data files are scripts that call View.put: pages opened from disk may load scripts, not fetch.
"use strict";
(() => {
  const waiting = new Map();
  const kept = new Map();
  const MOST = 160;

  View.put = (name, value) => {
    const entry = waiting.get(name);
    if (entry) { entry.value = value; entry.arrived = true; }
  };

  View.load = (name) => {
    if (kept.has(name)) {
      const found = kept.get(name);
      kept.delete(name);
      kept.set(name, found);
      return found;
    }
    const promise = new Promise((resolve, reject) => {
      const entry = { arrived: false };
      waiting.set(name, entry);
      const script = document.createElement("script");
      const finish = () => { waiting.delete(name); script.remove(); };
      script.src = `data/${name}.js`;
      script.onload = () => {
        finish();
        if (entry.arrived) resolve(entry.value);
        else reject(new Error(`data/${name}.js is damaged. Build the site again with dictlearn view.`));
      };
      script.onerror = () => {
        finish();
        reject(new Error(`data/${name}.js is missing from this site.`));
      };
      document.head.append(script);
    });
    kept.set(name, promise);
    promise.catch(() => kept.delete(name));
    if (kept.size > MOST) kept.delete(kept.keys().next().value);
    return promise;
  };

  // base64 of raw deflate -> bytes
  View.unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  // all low bytes, then all high bytes
  View.words16 = (bytes) => {
    const n = bytes.length >> 1, out = new Uint16Array(n);
    for (let i = 0; i < n; i++) out[i] = bytes[i] | (bytes[n + i] << 8);
    return out;
  };

  // A packed column -> numbers, NaN where there is none.
  const MISSING = 65535;
  View.column = async (name) => {
    const packed = await View.load(name);
    const bytes = await View.unpack(packed.data);
    const low = packed.bytes === 1 ? bytes : View.words16(bytes);
    const missing = packed.bytes === 1 ? 255 : MISSING;
    const out = new Float64Array(low.length);
    if (packed.as === "whole") {
      for (let i = 0; i < out.length; i++) out[i] = low[i] === MISSING ? NaN : low[i];
    } else if (packed.as === "wide") {
      const high = View.words16(await View.unpack(packed.high));
      for (let i = 0; i < out.length; i++) {
        out[i] = low[i] === MISSING && high[i] === MISSING ? NaN : high[i] * 65536 + low[i];
      }
    } else {
      for (let i = 0; i < out.length; i++) {
        const x = packed.low + packed.step * low[i];
        out[i] = low[i] === missing ? NaN : packed.as === "log" ? Math.exp(x) : x;
      }
    }
    return out;
  };

  View.site = null;
  View.start = async () => {
    View.site = await View.load("site");
    return View.site;
  };
  View.labels = async () => View.load("labels");
  View.classes = async () => (View.site.classes ? View.load("classes") : []);
  View.className = (names, c) => (names[c] === undefined ? `class ${c}` : names[c]);
  View.itemRecord = async (position) => {
    const shard = await View.load(`items/${Math.floor(position / View.site.items.shard)}`);
    const record = shard[String(position)];
    if (!record) throw new Error(`Item ${position} is on no page of this site.`);
    return record;
  };
  View.thumb = (position) => `thumbs/${Math.floor(position / 1000)}/${position}.webp`;
  View.picture = (position, t = 0) => `pictures/${Math.floor(position / 1000)}/${position}-${t}.webp`;
})();
