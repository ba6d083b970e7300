// ---- roofline: the least time that the device needs beside what it took
function roofline(work) {
  for (const phase of ["prefill", "decode"]) {
    const rows = data.roofline.filter((r) => r.phase === phase && family(r) + r.load === work)
      .map((r) => ({ ...r, model: byName.get(r.model) })).filter((r) => r.model && r.bound_s != null).reverse();
    const id = `roof-${phase}`;
    tall(id, 50 + 50 * Math.max(1, rows.length));
    const most = Math.max(0, ...rows.map((r) => Math.max(r.bound_s, r.measured_s ?? 0))) * 1e3;
    const bar = (value, r, row, marker, what) => ({
      type: "bar", orientation: "h", x: [1e3 * value], y: [row], width: what === "bound" ? 0.3 : 0.66, marker,
      hovertemplate: hover([r.model.label, `${what} ${seconds(value)}`, `limited by ${words(r.limited_by)}`,
        ...Object.entries(r.parts).filter(([, s]) => s != null).map(([name, s]) => `${words(name.replace(/_s$/, ""))} ${seconds(s)}`)]),
    });
    draw(id, rows.flatMap((r, row) => [
      ...(r.measured_s == null ? [] : [bar(r.measured_s, r, row, { color: r.model.colour, opacity: 0.28 }, "measured")]),
      bar(r.bound_s, r, row, { color: r.model.colour }, "bound"),
    ]), {
      barmode: "overlay", margin: { l: 8, r: 8, t: 4, b: 44 },
      annotations: rows.map((r, row) => ({ x: 1e3 * Math.max(r.bound_s, r.measured_s ?? 0), y: row, xanchor: "left", xshift: 7,
        showarrow: false, align: "left", font: { size: 12, color: INK },
        text: `${percent(r.attained)}<br><span style="color:${SOFT}">${words(r.limited_by)}</span>` })),
      xaxis: axis("ms", { range: [0, most * (narrow() ? 1.7 : 1.3)], nticks: 4 }),
      yaxis: rowAxis(rows.map((r) => short(r.model.label))),
    });
    describe(id, `${phase}: bound and measured. ` + rows.map((r) =>
      `${r.model.label}: bound ${seconds(r.bound_s)}, measured ${seconds(r.measured_s)}, ${percent(r.attained)} attained, limited by ${words(r.limited_by)}`).reverse().join("; ") + ".");
  }
}
const words = (name) => plain(String(name).replace(/_/g, " "));

function setUpRoofline() {
  const select = element("roof-work");
  if (!select) return;
  const keys = [...new Map(data.roofline.map((r) => [family(r) + r.load, `${r.engine}, ${load(r.mode, r.load)}, ${r.input_len} + ${r.output_len} tokens`]))];
  const first = data.workloads[data.headline];
  fill(select, keys.map(([, name]) => name), first ? keys.findIndex(([key]) => key === family(first) + first.load) : 0);
  const show = () => roofline(keys[Number(select.value)][0]);
  select.addEventListener("change", show);
  redraw.push(show);
}
