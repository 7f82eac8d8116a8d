/* Activation Profiles: three linked views of one set of examples.
   Architecture: take layers into the flow or out of it.  Flow: choose an example, a strength, a layer.  Layer: its units. */

const Profiles = (() => {
  const { el, svg, format, number, bytes, colourMap, hint, hush, colours, ramps, short, pictureOf } = Charts;
  const CLEAN = colours.series[0], ADV = colours.series[1], OTHER = colours.series[4];
  const LOW = -0.75, HIGH = 1.75;
  const clip = (v) => Math.min(Math.max(v, LOW), HIGH);

  function draw(chart, ctx) {
    const key = `${ctx.view}/${ctx.chart}`;
    const state = (ctx.ui[key] ||= { example: fooled(chart), layer: null, strength: chart.strength.length - 1, out: new Set(), colour: null, others: true, against: ctx.others().find((o) => o.beside)?.label ?? "", sort: null, filter: "" });
    if (state.example >= chart.examples.length) state.example = 0;
    if (!chart.layers.includes(state.layer)) state.layer = turningLayer(chart, state.example) ?? chart.layers.at(-1);
    if (!(state.colour in chart.colours)) state.colour = Object.keys(chart.colours)[0];
    state.strength = Math.min(state.strength, chart.strength.length - 1);
    const architecture = el("div", {}), flow = el("div", {}), layer = el("div", {}), says = el("p", { class: "says-flow" });
    let width = 0, other = null;
    const refresh = () => { drawArchitecture(chart, state, ctx, architecture, refresh); drawFlow(chart, state, flow, width, other, says, refresh); drawLayer(chart, state, ctx, layer, refresh); mark(); };
    const examples = chart.examples.map((title, i) => {
      const [name, ...details] = title.split(" · ");
      return el("button", { type: "button", class: "example", "data-example": i, title: details.join("\n"), onclick: () => { state.example = i; state.layer = turningLayer(chart, i) ?? state.layer; refresh(); } },
        pictureOf(chart.images.clean[i], chart.images, ctx), pictureOf(chart.images.adv[i], chart.images, ctx), el("span", {}, name), el("small", {}, `${chart.classes[i][0]} → ${chart.classes[i][1]}`));
    });
    const mark = () => examples.forEach((node, i) => node.setAttribute("aria-pressed", String(i === state.example)));
    const slider = el("input", { type: "range", min: 0, max: chart.strength.length - 1, step: 1, value: state.strength, "aria-label": "Attack strength",
      oninput: (event) => { state.strength = Number(event.target.value); reading.textContent = percent(chart.strength[state.strength]); refresh(); } });
    const reading = el("b", {}, percent(chart.strength[state.strength]));
    const others = ctx.others();
    const against = el("select", { "aria-label": "Compare with", onchange: (event) => { state.against = event.target.value; compare(); } },
      el("option", { value: "" }, "nothing else"), others.map(({ label }) => el("option", { value: label, selected: label === state.against }, label)));
    async function compare() {
      other = (await others.find((o) => o.label === state.against)?.load()) ?? null;
      refresh();
    }
    ctx.after.push({ holder: flow, draw: (space) => { width = space; refresh(); if (state.against) compare(); } });
    return el("figure", { class: "card wide profiles" }, el("h3", { class: "chart-title" }, chart.title),
      chart.warnings.map((text) => el("p", { class: "note" }, text)),
      el("div", { class: "examples", role: "group", "aria-label": "Examples" }, examples),
      el("div", { class: "controls" }, el("label", {}, "attack strength ", slider, reading),
        el("label", {}, el("input", { type: "checkbox", checked: state.others, onchange: (event) => { state.others = event.target.checked; refresh(); } }), "other examples too"),
        others.length ? el("label", {}, "compare with ", against) : null),
      el("h4", {}, "Flow View ", el("small", {}, "0 is the centre of the true class in the background, 1 that of the target; click a layer to open it below")),
      flow, says,
      el("h4", {}, "Architecture View ", el("small", {}, "click a coloured layer to take it into the flow or out of it")),
      el("div", { class: "controls" }, el("label", {}, "colour ", el("select", { "aria-label": "Colour of the layers", onchange: (event) => { state.colour = event.target.value; refresh(); } },
        Object.keys(chart.colours).map((name) => el("option", { value: name, selected: name === state.colour }, name))))),
      architecture,
      el("h4", {}, "Layer View ", el("small", {}, "maps of the chosen example on one scale a layer; numbers are means over all examples")),
      layer);
  }

  const percent = (v) => `${Math.round(100 * v)} %`;
  const fooled = (chart) => { const i = chart.turning.findIndex((t) => t >= 0); return i < 0 ? 0 : i; };
  const turningLayer = (chart, i) => (chart.turning[i] >= 0 ? chart.layers[chart.turning[i]] : null);
  const sequence = (chart, state) => chart.layers.map((_, l) => l).filter((l) => !state.out.has(chart.layers[l]));

  /* ---- Flow View ---- */

  function drawFlow(chart, state, holder, space, other, says, refresh) {
    const width = Math.max(space, 280), height = 330, left = 92, right = width - 16, top = 14, bottom = height - 62;
    const shown = sequence(chart, state), i = state.example, pair = chart.pair[i];
    const x = (k) => (shown.length > 1 ? left + (k * (right - left)) / (shown.length - 1) : (left + right) / 2);
    const y = (v) => bottom - ((clip(v) - LOW) / (HIGH - LOW)) * (bottom - top);
    const path = (values) => values.map((v, k) => (v === null ? "" : `${k && values[k - 1] !== null ? "L" : "M"}${x(k).toFixed(1)} ${y(v).toFixed(1)}`)).join("");
    const [yes, no] = chart.classes[i];
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", class: "flow", "data-layers": shown.length,
      "aria-label": `Evidence of ${chart.examples[i].split(" · ")[0]} layer by layer between ${yes} and ${no}` });
    [colours.series[2], colours.series[3]].forEach((colour, side) => {
      for (const [lower, upper, opacity] of [[0, 4, 0.13], [1, 3, 0.22]]) {
        const up = shown.map((l, k) => `${x(k)},${y(chart.bands[l][pair][side][upper] ?? 0)}`), down = shown.map((l, k) => `${x(k)},${y(chart.bands[l][pair][side][lower] ?? 0)}`).reverse();
        picture.append(svg("polygon", { points: [...up, ...down].join(" "), fill: colour, "fill-opacity": opacity }));
      }
      picture.append(svg("path", { d: path(shown.map((l) => chart.bands[l][pair][side][2])), fill: "none", stroke: colour, "stroke-width": 1.2, "stroke-dasharray": "2 3" }));
    });
    for (const [v, text] of [[0, `true: ${yes}`], [0.5, "½"], [1, `target: ${no}`]]) picture.append(
      svg("line", { class: v === 0.5 ? "now" : "grid", x1: left, x2: right, y1: y(v), y2: y(v) }),
      svg("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, text.length > 14 ? text.slice(0, 13) + "…" : text));
    const line = (values, attributes) => picture.append(svg("path", { d: path(values), fill: "none", "stroke-width": 2.6, "stroke-linejoin": "round", ...attributes }));
    const at = (data, s, n) => shown.map((l) => place(chart, data, data.position[s], l, n));
    if (state.others) chart.examples.forEach((_, n) => { if (n !== i) line(at(chart, state.strength, n), { stroke: OTHER, "stroke-width": 1, "stroke-opacity": 0.5 }); });
    if (other && i < other.examples.length) {
      line(at(other, 0, i), { stroke: CLEAN, "stroke-width": 1.6, "stroke-dasharray": "6 4", class: "against" });
      line(at(other, Math.min(state.strength, other.strength.length - 1), i), { stroke: ADV, "stroke-width": 1.6, "stroke-dasharray": "6 4", class: "against" });
    }
    line(at(chart, 0, i), { stroke: CLEAN, class: "clean-line" });
    line(at(chart, state.strength, i), { stroke: ADV, class: "adv-line" });
    const turn = shown.indexOf(chart.turning[i]);
    if (turn >= 0) picture.append(svg("circle", { class: "turn", cx: x(turn), cy: y(chart.position.at(-1)[chart.turning[i]][i]), r: 7, fill: "none", stroke: "var(--ink)", "stroke-width": 2 }));
    const step = shown.length > 1 ? (right - left) / (shown.length - 1) : right - left;
    const rows = Math.max(...shown.map((l) => chart.layers[l].length)) * 6.5 > step ? 3 : 1, most = Math.max(6, Math.floor((rows * step) / 6.5) - 2);
    shown.forEach((l, k) => {
      const name = chart.layers[l], chosen = name === state.layer;
      const label = svg("text", { x: x(k), y: bottom + 16 + (k % rows) * 14, "text-anchor": k === 0 ? "start" : k === shown.length - 1 ? "end" : "middle", class: chosen ? "chosen" : "" }, name.length > most ? "…" + name.slice(1 - most) : name);
      picture.append(svg("line", { class: chosen ? "now" : "grid", x1: x(k), x2: x(k), y1: top, y2: bottom }), label,
        svg("rect", { class: "hit", "data-layer": name, tabindex: 0, role: "button", "aria-label": `open layer ${name}`, x: x(k) - step / 2, y: 0, width: step, height, fill: "transparent",
          onclick: () => { state.layer = name; refresh(); }, onkeydown: (e) => { if (e.key === "Enter") { state.layer = name; refresh(); } },
          onpointermove: (e) => hint(e, about(chart, state, l)), onpointerleave: hush }));
    });
    holder.replaceChildren(picture, el("div", { class: "legend" }, [["clean", CLEAN, ""], [`attacked, ${percent(chart.strength[state.strength])} strength`, ADV, ""], [`background of ${yes}`, colours.series[2], ""], [`background of ${no}`, colours.series[3], ""],
      ...(other ? [[`dashed: ${state.against}${other.classes[i]?.[1] === no ? "" : `, towards ${other.classes[i]?.[1]}`}`, "var(--muted)", ""]] : []), ...(turn >= 0 ? [["○ turning layer", "transparent", ""]] : [])].map(([text, colour]) => el("span", {}, el("i", { class: "stroke", style: `background:${colour}` }), text))));
    says.textContent = sentence(chart, i) + (other && i < other.examples.length ? ` ${state.against}: ${sentence(other, i)}` : "");
  }

  /* Position at a layer of this network in another: by name where the layers are the same, else at the same depth. */
  function place(chart, other, positions, l, n) {
    if (chart === other || String(chart.layers) === String(other.layers)) return positions[l][n];
    const depth = (l / Math.max(chart.layers.length - 1, 1)) * (positions.length - 1), below = Math.floor(depth), above = Math.ceil(depth);
    const [a, b] = [positions[below][n], positions[above][n]];
    return a === null || b === null ? null : a + (depth - below) * (b - a);
  }

  function about(chart, state, l) {
    const i = state.example, near = (side) => chart.perception[side][l][i].map((v) => (v === null ? "–" : percent(v))).join(" / ");
    return `${chart.layers[l]}\nclean: ${format(chart.position[0][l][i])}\nattacked: ${format(chart.position[state.strength][l][i])}\n` +
      `nearest background images of ${chart.classes[i].join(" / ")}\n  clean: ${near(0)}\n  attacked: ${near(1)}`;
  }

  function sentence(chart, i) {
    const [yes, no] = chart.classes[i], where = turningLayer(chart, i), end = chart.position.at(-1).at(-1)[i];
    if (where === null) return `${chart.examples[i].split(" · ")[0]} does not turn: at the last layer the attacked image stands at ${format(end)} between ${yes} (0) and ${no} (1).`;
    const from = chart.strength.findIndex((_, s) => chart.position[s].at(-1)[i] > 0.5);
    return `${chart.examples[i].split(" · ")[0]} turns from ${yes} to ${no} at layer ${where}` + (from > 0 ? `; at the last layer ${percent(chart.strength[from])} of the perturbation is enough.` : ".");
  }

  /* ---- Architecture View ---- */

  function shade(most, v) {
    const rgb = new Uint8Array(3);
    colourMap(rgb, [v ?? 0], null, 1, most, "positive");
    return { fill: v === null ? "var(--card)" : `rgb(${[...rgb].join(" ")})`, dark: v !== null && rgb[0] + rgb[1] + rgb[2] < 330 };
  }

  function drawArchitecture(chart, state, ctx, holder, refresh) {
    const boxWidth = 118, boxHeight = 56, gapX = 26, gapY = 14;
    const columns = Math.max(...chart.nodes.map((n) => n.column)) + 1, lanes = Math.max(...chart.nodes.map((n) => n.lane)) + 1;
    const width = columns * (boxWidth + gapX), height = lanes * (boxHeight + gapY) + 8;
    const place = (n) => [n.column * (boxWidth + gapX) + 2, n.lane * (boxHeight + gapY) + 4];
    const values = chart.colours[state.colour], most = ctx.shared("colours", Object.keys(chart.colours).indexOf(state.colour)) || 1e-12;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, style: `width:${width}px;max-width:none`, class: "architecture", role: "group", "aria-label": "The network as a graph of layers" });
    for (const [a, b] of chart.edges) {
      const [x1, y1] = place(chart.nodes[a]), [x2, y2] = place(chart.nodes[b]), from = x1 + boxWidth, mid = (from + x2) / 2;
      const far = chart.nodes[b].column - chart.nodes[a].column > 1 && chart.nodes[a].lane === chart.nodes[b].lane;
      const lift = far ? Math.min(y1, y2) - 3 : null; // a skip over boxes of its own lane runs above them
      picture.append(svg("path", { class: "edge", d: far
        ? `M${from} ${y1 + 8}C${from + 12} ${lift} ${from + 12} ${lift} ${from + 24} ${lift}L${x2 - 24} ${lift}C${x2 - 12} ${lift} ${x2 - 12} ${lift} ${x2} ${y2 + 8}`
        : `M${from} ${y1 + boxHeight / 2}C${mid} ${y1 + boxHeight / 2} ${mid} ${y2 + boxHeight / 2} ${x2} ${y2 + boxHeight / 2}` }));
    }
    for (const node of chart.nodes) {
      const [px, py] = place(node), known = node.layer >= 0, name = known ? chart.layers[node.layer] : node.name;
      const value = known ? values[node.layer] : null, { fill, dark } = shade(most, value), inside = known && !state.out.has(name);
      const toggle = () => { if (inside && sequence(chart, state).length < 2) return; if (inside) state.out.add(name); else state.out.delete(name); refresh(); };
      const text = (dy, words, size) => svg("text", { x: px + 8, y: py + dy, style: `font-size:${size}px;fill:${dark ? "#fff" : known ? "#171b22" : "var(--muted)"}` }, words.length > 16 ? "…" + words.slice(-15) : words);
      const box = svg("g", { class: known ? "node known" : "node", "data-layer": known ? name : null, ...(known ? { tabindex: 0, role: "button", "aria-pressed": String(inside), "aria-label": `layer ${name}`,
        onclick: toggle, onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); toggle(); } } } : {}),
        onpointermove: (e) => hint(e, `${node.name} (${node.kind})\noutput ${node.shape}\n${node.parameters.toLocaleString("en")} parameters` + (known ? `\n${state.colour}: ${format(value)}` : "")), onpointerleave: hush },
        svg("rect", { x: px, y: py, width: boxWidth, height: boxHeight, rx: 7, fill: known ? fill : "var(--wash)", stroke: inside ? "var(--ink)" : "var(--line)", "stroke-width": inside ? 2 : 1 }),
        text(18, node.name, 11.5), text(33, node.shape, 10.5), text(47, node.parameters ? `${node.parameters.toLocaleString("en")} par.` : node.kind, 10.5));
      picture.append(box);
    }
    holder.replaceChildren(el("div", { class: "legend" }, el("div", { class: "scale" }, el("div", { class: "ramp", style: `background:${ramps.positive}` }),
      el("div", { class: "ticks" }, [0, most / 4, most].map((v) => el("span", {}, short(v))))), el("span", { class: "muted" }, `${state.colour}; square-root scale${ctx.single ? (ctx.others().some((o) => o.beside) ? ", the same for all networks" : "") : ", the same at every epoch"}; a bold frame: in the flow`)), el("div", { class: "scroll" }, picture));
  }

  /* ---- Layer View ---- */

  /* A filter is "> 0.3" or "< 0", of the quantity sorted by, or part of a unit's number or concept. */
  function wanted(data, names, state, u) {
    const asked = /^\s*([<>])\s*([-−]?[\d.]+)\s*$/.exec(state.filter), value = data.columns[state.sort][u];
    if (asked) { const than = Number(asked[2].replace("−", "-")); return typeof value === "number" && (asked[1] === ">" ? value > than : value < than); }
    const words = names.map((n) => data.columns[n][u]).filter((v) => typeof v === "string").join(" ");
    return `unit ${data.units[u]} ${words}`.toLowerCase().includes(state.filter.trim().toLowerCase());
  }

  function drawLayer(chart, state, ctx, holder, refresh) {
    const l = chart.layers.indexOf(state.layer), data = chart.units[l];
    const chips = el("div", { class: "legend" }, chart.layers.map((name) => el("button", { type: "button", class: "chip", "aria-pressed": String(name === state.layer), onclick: () => { state.layer = name; refresh(); } }, name)));
    if (!data) { holder.replaceChildren(chips, el("p", { class: "muted" }, "No maps are kept for this layer.")); return; }
    const names = Object.keys(data.columns);
    if (!names.includes(state.sort)) state.sort = names[0];
    const codes = new Int8Array((data.cache ||= bytes(data.data)).buffer), size = data.height * data.width, U = data.units.length;
    const cell = (side, u) => codes.subarray(((state.example * 2 + side) * U + u) * size, ((state.example * 2 + side) * U + u + 1) * size);
    const sorted = data.units.map((_, u) => u).filter((u) => wanted(data, names, state, u))
      .sort((a, b) => { const [p, q] = [data.columns[state.sort][a], data.columns[state.sort][b]]; return typeof p === "string" ? p.localeCompare(q) : (q ?? -Infinity) - (p ?? -Infinity); });
    const limit = ctx.limit("maps", l) || data.step * 127;
    const map = (values, title) => {
      const canvas = el("canvas", { width: data.width, height: data.height, role: "img", "aria-label": title, title }), rgb = new Uint8Array(3 * size);
      colourMap(rgb, values, null, data.step, limit, "signed");
      const context = canvas.getContext("2d"), pixels = context.createImageData(data.width, data.height);
      for (let k = 0; k < size; k++) { pixels.data.set(rgb.subarray(3 * k, 3 * k + 3), 4 * k); pixels.data[4 * k + 3] = 255; }
      context.putImageData(pixels, 0, 0);
      return canvas;
    };
    const cards = sorted.map((u) => {
      const clean = cell(0, u), adv = cell(1, u), change = Int16Array.from(clean, (v, k) => adv[k] - v);
      return el("div", { class: "unit", "data-unit": data.units[u] }, el("b", {}, `unit ${data.units[u]}`),
        el("div", { class: "trio" }, map(clean, "clean"), map(adv, "attacked"), map(change, "attacked − clean"), data.filters ? pictureOf(data.filters.cells[u], data.filters, ctx) : null),
        el("dl", {}, names.map((n) => el("div", {}, el("dt", {}, n), el("dd", {}, typeof data.columns[n][u] === "string" ? data.columns[n][u] || "–" : format(data.columns[n][u]))))));
    });
    const sort = el("select", { "aria-label": "Sort units by", onchange: (event) => { state.sort = event.target.value; refresh(); } }, names.map((n) => el("option", { value: n, selected: n === state.sort }, n)));
    const filter = el("input", { type: "search", placeholder: "concept, unit 7, or > 0.3", title: "part of a concept's or unit's name, or > or < a number: of what is sorted by", value: state.filter, "aria-label": "Filter units",
      onchange: (event) => { state.filter = event.target.value; refresh(); } });
    holder.replaceChildren(chips, el("div", { class: "controls" }, el("label", {}, "sort by ", sort), el("label", {}, "show ", filter),
      el("span", { class: "muted" }, `${sorted.length} of ${data.of} units; left to right: clean, attacked, difference${data.filters ? ", filter" : ""}`),
      el("span", { class: "scale" }, el("div", { class: "ramp", style: `background:${ramps.signed}` }), el("div", { class: "ticks" }, [-limit, 0, limit].map((v) => el("span", {}, short(v)))))),
      el("div", { class: "unit-grid", "data-example": state.example, "data-layer": state.layer }, cards));
  }

  return { draw };
})();
