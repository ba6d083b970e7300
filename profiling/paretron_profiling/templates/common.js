// What every figure shares: the data, how numbers and names are written, how Plotly is asked to draw.
const data = JSON.parse(document.getElementById("data").textContent);
const byName = new Map(data.models.map((m) => [m.name, m]));
const INK = "#1d232e", SOFT = "#545d6b", LINE = "#e4e7ec", FAINT = "#6b7482";
const narrow = () => window.innerWidth < 560;
const element = (id) => document.getElementById(id);

// Plotly reads a little HTML in its texts; names must not be read as such.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const cut = (text, room) => (text.length > room ? text.slice(0, room - 1) + "…" : text);
const short = (text) => plain(cut(text, narrow() ? 16 : 26));
const number = (x, digits = 3) =>
  x == null ? "–"
    : Math.abs(x) >= 10 ** (digits - 1) ? Math.round(x).toLocaleString("en-US")
      : String(Number(x.toPrecision(digits)));
// As in the text: close students must not look equal.
const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(Math.abs(x) < 0.05 ? 3 : 2);
const times = (x) => x.toFixed(2) + "×";
const percent = (x) => (x == null ? "–" : `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`);
const bytes = (x) => {
  if (x == null) return "–";
  for (const [scale, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (Math.abs(x) >= scale) return `${Number((x / scale).toPrecision(3))} ${unit}`;
  return `${Math.round(x)} B`;
};
const seconds = (x) => (x == null ? "–" : x < 1 ? `${number(1e3 * x)} ms` : `${number(x)} s`);

const base = (extra) => ({
  font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: INK },
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
  margin: { l: 64, r: 16, t: 12, b: 48 }, hovermode: "closest", dragmode: false,
  hoverlabel: { bgcolor: "#fff", bordercolor: "#8b95a3", font: { color: INK, size: 13 }, align: "left" },
  ...extra,
});
const axis = (title, extra) => ({
  title: { text: title, font: { size: 13, color: SOFT }, standoff: 10 }, gridcolor: LINE, zeroline: false,
  linecolor: "#b9c0ca", tickfont: { color: SOFT }, fixedrange: true, automargin: true, ...extra,
});
// Rows from the bottom up, by position: two names may read the same once shortened.
const rowAxis = (labels, extra) => axis("", { gridcolor: "rgba(0,0,0,0)", tickfont: { color: INK },
  tickvals: labels.map((_, row) => row), ticktext: labels.map((text) => text + "  "), ...extra });
const CONFIG = { displayModeBar: false, responsive: true, displaylogo: false };
const draw = (id, traces, layout) => {
  if (element(id)) Plotly.react(id, traces, base(layout), CONFIG);
};
const describe = (id, text) => element(id)?.setAttribute("aria-label", text);
const hover = (lines) => lines.map(plain).join("<br>") + "<extra></extra>";
const tall = (id, pixels) => { if (element(id)) element(id).style.height = `${pixels}px`; };
const fill = (select, names, chosen = 0) => {
  names.forEach((name, i) => select.add(new Option(name, i)));
  select.value = String(Math.max(0, chosen));
};

// ---- workloads: what the models have in common
const same = (a, b) =>
  a.engine === b.engine && a.mode === b.mode && a.load === b.load && a.input_len === b.input_len && a.output_len === b.output_len;
const load = (mode, n) => ({ offline: `batch ${n}`, closed: `${n} in flight`, open: `${n} requests/s` })[mode];
const measured = (w) =>
  data.models.map((m) => ({ model: m, speed: m.speed.find((s) => same(s, w)) })).filter((p) => p.speed);
const ratio = (name, w, rule) =>
  data.speedup.find((s) => s.model === name && s.rule === rule && s.engine === w.engine &&
    s.input_len === w.input_len && s.output_len === w.output_len &&
    s.mode === w.mode && (rule !== "same_batch" || s.load === w.load));
const range = (speed, key) => speed.intervals[key] || speed.ranges[key] || [speed[key], speed[key]];
const whisker = (speed, key, colour, extra) => {
  const [low, high] = range(speed, key);
  return { type: "data", symmetric: false, array: [high - speed[key]], arrayminus: [speed[key] - low],
    color: colour, thickness: 1.4, width: 5, ...extra };
};
// Workloads that differ in their load alone belong together.
const family = (s) => `${s.engine}, ${{ offline: "batches", closed: "closed loop", open: "open loop" }[s.mode]}, ${s.input_len} + ${s.output_len} tokens`;
const families = (wanted) =>
  [...new Set(data.models.flatMap((m) => m.speed.filter(wanted).map(family)))];
const inFamily = (model, name) =>
  model.speed.filter((s) => family(s) === name).sort((a, b) => a.load - b.load);
