// ---- what load does: throughput for one user against that of a device, and latencies
const lines = (points, model, x, y, extra) => ({
  x: points.map(x), y: points.map(y), mode: "lines+markers", line: { color: model.colour, width: 2, ...extra?.line },
  marker: { color: extra?.hollow ? "#fff" : model.colour, symbol: model.symbol, size: extra?.hollow ? 11 : 8,
    line: { color: model.colour, width: extra?.hollow ? 2 : 0 } },
});

function perUser(name) {
  const devices = (s) => data.devices[s.engine] || 1;
  const x = (s) => 1e3 / s.tpot_ms, y = (s) => s.output_tok_s / devices(s);
  const found = data.models.map((model) => ({ model,
    points: inFamily(model, name).filter((s) => s.tpot_ms > 0 && s.output_tok_s != null) })).filter((f) => f.points.length);
  const all = found.flatMap((f) => f.points);
  draw("per-user", found.map(({ model, points }) => ({ ...lines(points, model, x, y),
    hovertemplate: points.map((s) => hover([model.label, load(s.mode, s.load),
      `${number(x(s))} tok/s for a user`, `${number(y(s))} tok/s of a device`])) })), {
    margin: { l: 64, r: 16, t: 12, b: 52 },
    annotations: found.map(({ model, points }) => {
      const best = points.reduce((a, b) => (y(a) > y(b) ? a : b));
      return { x: x(best), y: y(best), yshift: 16, showarrow: false, text: `<b>${short(model.label)}</b>`,
        font: { color: model.colour, size: 12 }, bgcolor: "rgba(255,255,255,0.8)" };
    }),
    xaxis: axis(narrow() ? "tokens/s for one user →" : "output tokens a second for one user (1 / TPOT) →", { range: padded(all.map(x), narrow() ? 0.3 : 0.15, 0), nticks: narrow() ? 4 : 8 }),
    yaxis: axis(narrow() ? "tokens/s of a device" : "output tokens a second of a device", { range: [0, Math.max(...all.map(y)) * 1.18], nticks: 6 }),
  });
  describe("per-user", `Throughput of a device against throughput for one user, ${name}. ` + found.map(({ model, points }) =>
    `${model.label}: ` + points.map((s) => `${load(s.mode, s.load)} ${number(y(s))} and ${number(x(s))}`).join(", ")).join("; ") + ".");
}

const LATENCIES = [["ttft", "ttft_ms", "TTFT"], ["tpot", "tpot_ms", "TPOT"], ["e2e", "e2e_ms", "E2E"]];
function latencies(name) {
  for (const [id, key, what] of LATENCIES) {
    const x = (s) => s.load, p99 = (s) => s.percentiles[key]?.p99;
    const found = data.models.map((model) => ({ model, points: inFamily(model, name).filter((s) => s[key] != null) }))
      .filter((f) => f.points.length);
    const all = found.flatMap((f) => f.points), loads = all.map(x);
    const wide = Math.max(...loads) >= 8 * Math.min(...loads);
    const traces = found.flatMap(({ model, points }) => {
      const high = points.filter((s) => p99(s) != null);
      const told = (s, words, value) => hover([model.label, load(s.mode, s.load), `${what} ${words} ${number(value)} ms`]);
      return [
        { ...lines(high, model, x, p99, { hollow: true, line: { dash: "dot", width: 1.5 } }),
          hovertemplate: high.map((s) => told(s, "99th percentile", p99(s))) },
        { ...lines(points, model, x, (s) => s[key]), hovertemplate: points.map((s) => told(s, "median", s[key])) },
      ];
    });
    draw(`latency-${id}`, traces, {
      margin: { l: 56, r: 10, t: 8, b: 48 },
      xaxis: axis(all[0]?.mode === "open" ? "requests a second" : "requests in flight",
        { type: wide ? "log" : "linear", tickvals: [...new Set(loads)].sort((a, b) => a - b) }),
      yaxis: axis("ms", { rangemode: "tozero", nticks: 5 }),
    });
    describe(`latency-${id}`, `${what} over load, ${name}, median and 99th percentile in ms. ` + found.map(({ model, points }) =>
      `${model.label}: ` + points.map((s) => `${load(s.mode, s.load)} ${number(s[key])} and ${number(p99(s))}`).join(", ")).join("; ") + ".");
  }
  element("load-legend").replaceChildren(...data.models.filter((m) => inFamily(m, name).length).map((m) => {
    const item = document.createElement("span");
    item.className = "key";
    item.style.setProperty("--accent", m.colour);
    item.textContent = m.label;
    return item;
  }));
}

function setUpLoad() {
  const user = element("user-group"), loop = element("loop-group");
  if (user) {
    const names = families((s) => s.tpot_ms > 0).filter((n) => data.models.some((m) => inFamily(m, n).length > 1));
    const first = data.workloads[data.headline];
    fill(user, names, first ? names.indexOf(family(first)) : 0);
    user.addEventListener("change", () => perUser(names[Number(user.value)]));
    redraw.push(() => perUser(names[Number(user.value)]));
  }
  if (loop) {
    const names = families((s) => s.mode !== "offline");
    fill(loop, names);
    loop.addEventListener("change", () => latencies(names[Number(loop.value)]));
    redraw.push(() => latencies(names[Number(loop.value)]));
  }
}
