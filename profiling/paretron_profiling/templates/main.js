// ---- the page: what is chosen, what is drawn, when it is drawn again
const redraw = [];

function setUpWorkload() {
  const select = element("workload"), measure = element("accuracy");
  if (!select || !data.workloads.length) return;
  fill(select, data.workloads.map((w) => w.name), data.headline);
  if (measure) fill(measure, data.accuracies.map((a) => a.label[0].toUpperCase() + a.label.slice(1)));
  const show = () => {
    const at = Number(select.value), w = data.workloads[at];
    if (measure) scatter(at, Number(measure.value));
    const keys = w.mode === "offline"
      ? [["prefill_tok_s", "Prefill", "prompt tokens a second"], ["decode_tok_s", "Decode", "output tokens a second"]]
      : [["output_tok_s", "Throughput", "output tokens a second"], ["goodput_s", "Goodput", "requests a second within the limits"]];
    bars("first-bars", w, ...keys[0]);
    bars("second-bars", w, ...keys[1]);
    ratios(w);
    memory(w);
    doubts(w);
    for (const place of document.querySelectorAll("[data-workload]")) place.textContent = w.name;
  };
  select.addEventListener("change", show);
  measure?.addEventListener("change", show);
  redraw.push(show);
}

setUpChoice();
setUpWorkload();
setUpLoad();
setUpRoofline();
setUpCurves();
setUpImportance();
for (const show of redraw) show();

// The labels' room depends on the width; a printed page shows the tables as well.
let was = narrow();
window.addEventListener("resize", () => {
  if (narrow() === was) return;
  was = narrow();
  for (const show of redraw) show();
});
const opened = [];
window.addEventListener("beforeprint", () => {
  for (const d of document.querySelectorAll("details:not([open])")) { d.open = true; opened.push(d); }
  for (const p of document.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(p);
});
window.addEventListener("afterprint", () => { while (opened.length) opened.pop().open = false; });
