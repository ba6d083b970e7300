// ---- which one to take: limits by sliders, and the model that the figures speak for
const STEPS = 40;
const milli = (x) => `${number(x)} ms`, rate = (x) => `${number(x)} tok/s`;
const LIMITS = [
  { id: "ttft", name: "Time to first token", of: (c) => c.speed.ttft_ms, most: true, say: milli, short: "TTFT" },
  { id: "tpot", name: "Time per output token", of: (c) => c.speed.tpot_ms, most: true, say: milli, short: "TPOT" },
  { id: "rate", name: "Throughput", of: (c) => c.speed.output_tok_s, most: false, say: rate, short: "throughput" },
  { id: "memory", name: "Memory", of: (c) => c.speed.memory, most: true, say: bytes, short: "memory" },
  { id: "above", name: "Loss above the teacher", of: (c) => c.model.above, most: true, say: (x) => `${signed(x)} nats`, short: "loss", even: true },
];
const AIMS = {
  fastest: { words: "the fastest", better: (a, b) => b.speed.output_tok_s - a.speed.output_tok_s },
  closest: { words: "the closest to its teacher", better: (a, b) => (a.model.above ?? Infinity) - (b.model.above ?? Infinity) },
  smallest: { words: "the smallest in memory", better: (a, b) => (a.speed.memory ?? Infinity) - (b.speed.memory ?? Infinity) },
};
// What an aim leaves open, as it does between the loads of one model, the others decide in this order.
const order = (aim) => (a, b) =>
  AIMS[aim].better(a, b) || AIMS.fastest.better(a, b) || AIMS.closest.better(a, b) || AIMS.smallest.better(a, b);

// The positions of a slider: values from the least to the most that was measured, and "any" at one end.
function scale(limit, candidates) {
  const found = candidates.map(limit.of).filter((x) => x != null);
  const low = Math.min(...found), high = Math.max(...found);
  const geometric = !limit.even && low > 0 && high > 4 * low;
  const at = (k) => {
    const share = k / STEPS, x = geometric ? low * (high / low) ** share : low + (high - low) * share;
    // Rounded for the eye, but never beyond what was measured.
    return k === 0 ? low : k === STEPS ? high : Math.min(high, Math.max(low, Number(x.toPrecision(3))));
  };
  return { usable: found.length > 1 && high > low, value: at, any: limit.most ? STEPS : 0 };
}

function slider(limit, range, changed) {
  const row = document.createElement("div"), label = document.createElement("label");
  const input = document.createElement("input"), output = document.createElement("output");
  row.className = "limit";
  Object.assign(input, { type: "range", id: `limit-${limit.id}`, min: 0, max: STEPS, step: 1, value: range.any });
  label.htmlFor = output.htmlFor = input.id;
  label.textContent = `${limit.name}, at ${limit.most ? "most" : "least"}`;
  const told = () => {
    const open = Number(input.value) === range.any;
    output.textContent = open ? "any" : limit.say(range.value(Number(input.value)));
    input.setAttribute("aria-valuetext", open ? "any" : `at ${limit.most ? "most" : "least"} ${output.textContent}`);
  };
  input.addEventListener("input", () => { told(); changed(); });
  told();
  row.append(label, output, input);
  return { row, limit: () => (Number(input.value) === range.any ? null : range.value(Number(input.value))) };
}

// How far a candidate is beyond a limit, as a part of it; 0 where it holds, null where nothing is known.
function beyond(limit, bound, candidate) {
  const value = limit.of(candidate);
  if (value == null) return null;
  const over = limit.most ? value - bound : bound - value;
  return over <= 1e-9 * Math.abs(bound) ? 0 : over / Math.max(Math.abs(bound), 1e-6);
}

const named = ({ model, speed }) => `${model.label} at ${load(speed.mode, speed.load)}`;
function facts(candidate) {
  const { model, speed } = candidate, said = [rate(speed.output_tok_s)];
  if (model.above != null) said.push(model.teacher ? "the teacher's own loss" : `${signed(model.above)} nats against its teacher`);
  said.push(`TTFT ${milli(speed.ttft_ms)}`, `TPOT ${milli(speed.tpot_ms)}`);
  if (speed.memory != null) said.push(`${bytes(speed.memory)} of weights and KV cache`);
  return said.join(", ");
}

function advise(candidates, bounds, aim) {
  const judged = candidates.map((c) => ({ ...c, misses: bounds.map(([limit, bound]) => ({ limit, bound, by: beyond(limit, bound, c) }))
    .filter((m) => m.by !== 0) }));
  const fit = judged.filter((c) => !c.misses.length).sort(order(aim));
  if (fit.length) {
    const models = new Set(fit.map((c) => c.model.name)).size, first = fit[0];
    const among = models === 1 ? (bounds.length ? "it alone meets these limits" : "no other model was measured here") :
      `${AIMS[aim].words} of the ${models} models${bounds.length ? " that meet these limits" : ""}`;
    return { taken: first, judged, words: ["Take ", named(first), `: ${among}, with ${facts(first)}.`] };
  }
  const known = judged.filter((c) => c.misses.every((m) => m.by != null));
  if (!known.length) return { taken: null, judged, words: ["None meets these limits", "", ": some of what they ask for was not measured."] };
  const worst = (c) => Math.max(...c.misses.map((m) => m.by));
  const nearest = known.sort((a, b) => worst(a) - worst(b) || order(aim)(a, b))[0];
  const missed = nearest.misses.map(({ limit, bound }) =>
    `${limit.short} (${limit.say(limit.of(nearest))}, not ${limit.say(bound)})`).join(" and ");
  return { taken: null, judged, words: ["None meets these limits. Nearest is ", named(nearest), `, which misses ${missed}.`] };
}

function candidateRows({ judged, taken }, bounded) {
  const body = element("candidates").tBodies[0];
  body.replaceChildren(...judged.map((c) => {
    const row = body.ownerDocument.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    head.textContent = c.model.label;
    const is = taken && taken.model === c.model && taken.speed === c.speed;
    if (is) row.className = "taken";
    const cell = (text) => { const td = document.createElement("td"); td.textContent = text; return td; };
    const verdict = is ? "take this" : !bounded ? "–" : c.misses.length ? `misses ${c.misses.map((m) => m.limit.short).join(", ")}` : "meets them";
    row.append(head, cell(load(c.speed.mode, c.speed.load)), cell(number(c.speed.output_tok_s)), cell(number(c.speed.ttft_ms)),
      cell(number(c.speed.tpot_ms)), cell(bytes(c.speed.memory)), cell(c.model.above == null ? "–" : c.model.teacher ? "0" : signed(c.model.above)), cell(verdict));
    return row;
  }));
}

function setUpChoice() {
  const section = element("choose"), select = element("choice-group");
  if (!section) return;
  const names = families((s) => s.output_tok_s != null), first = data.workloads[data.headline];
  if (!names.length) return;
  fill(select, names, first ? names.indexOf(family(first)) : 0);
  let sliders = [], candidates = [];
  const aim = () => document.querySelector("input[name=aim]:checked").value;
  const show = () => {
    const bounds = sliders.map(([limit, s]) => [limit, s.limit()]).filter(([, bound]) => bound != null);
    const found = advise(candidates, bounds, aim()), strong = document.createElement("strong");
    strong.textContent = found.words[1];
    element("advice").replaceChildren(found.words[0], strong, found.words[2]);
    element("advice").dataset.taken = found.taken ? found.taken.model.name : "";
    candidateRows(found, bounds.length > 0);
  };
  const begin = () => {
    const name = names[Number(select.value)];
    candidates = data.models.flatMap((model) => inFamily(model, name).filter((s) => s.output_tok_s != null).map((speed) => ({ model, speed })));
    sliders = LIMITS.map((limit) => [limit, scale(limit, candidates)]).filter(([, range]) => range.usable)
      .map(([limit, range]) => [limit, slider(limit, range, show)]);
    element("limits").replaceChildren(...sliders.map(([, s]) => s.row));
    const has = (key) => sliders.some(([limit]) => limit.id === key);
    for (const [value, key] of [["closest", "above"], ["smallest", "memory"]]) {
      const radio = document.querySelector(`input[name=aim][value=${value}]`);
      radio.disabled = !has(key);
      if (radio.disabled && radio.checked) document.querySelector("input[name=aim][value=fastest]").checked = true;
      radio.parentElement.hidden = radio.disabled;
    }
    show();
  };
  for (const radio of document.querySelectorAll("input[name=aim]")) radio.addEventListener("change", show);
  select.addEventListener("change", begin);
  element("reset").addEventListener("click", begin);
  section.hidden = false;
  begin();
}
