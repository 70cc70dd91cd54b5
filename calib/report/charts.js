// --- charts: drawn when they come into view, and anew when the colours change --------------------

const builders = new Map(); // plot -> () => {data, layout}
const drawn = new WeakSet();
const inView = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) draw(target);
}, { rootMargin: "200px" });

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colorOf = (method) => css(COLORS.get(method));

/** ``words`` as Plotly's labels take them, which know some markup. */
function plain(words) {
  return String(words).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** A figure; ``build`` makes its data and layout from the document and the colours in force. */
function chart(title, about, build) {
  const label = `Chart: ${title}. ${about}`;
  const plot = make("div", { className: "plot", role: "img", "aria-label": label });
  builders.set(plot, build);
  inView.observe(plot);
  const caption = make("figcaption", {}, title, make("span", {}, about));
  return make("figure", {}, caption, plot);
}

function draw(plot) {
  inView.unobserve(plot);
  drawn.add(plot);
  const { data, layout } = builders.get(plot)();
  Plotly.react(plot, data, housed(layout), { displayModeBar: false, responsive: true });
}

/** Draws again what was drawn, or all; forgets what is no longer on the page. */
function redraw({ all }) {
  for (const plot of builders.keys()) {
    if (!plot.isConnected) builders.delete(plot);
    else if (all || drawn.has(plot)) draw(plot);
  }
}

/** The layout that all charts share, with what is a chart's own. */
function housed({ xaxis = {}, yaxis = {}, margin = {}, ...own }) {
  const [ink, muted, line, surface] = ["--ink", "--muted", "--line", "--surface"].map(css);
  const axis = ({ title = "", ...given }) => ({
    gridcolor: line, zerolinecolor: line, linecolor: muted, tickfont: { color: muted },
    automargin: true, exponentformat: "power", ...given,
    title: { text: title, font: { size: 12, color: muted }, standoff: 8 },
  });
  return {
    font: { family: "system-ui, sans-serif", size: 12, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: surface, bordercolor: line, font: { color: ink } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    margin: { l: 52, r: 14, t: 14, b: 44, ...margin },
    // A finger scrolls the page, it does not zoom the chart.
    dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
    showlegend: false,
    ...own,
    xaxis: axis(xaxis),
    yaxis: axis(yaxis),
  };
}

// --- of the model -------------------------------------------------------------------------------

/** Bars of one field of the results, by width and method. */
function methodBars(field, show) {
  const data = doc.methods.map((method) => {
    const rows = doc.rows.filter((row) => row.method === method && known(row[field]));
    return {
      type: "bar",
      name: plain(method),
      x: rows.map((row) => `${row.bits} bits`),
      y: rows.map((row) => row[field]),
      marker: { color: colorOf(method) },
      customdata: rows.map((row) => show(row[field])),
      hovertemplate: "%{customdata} dB",
    };
  }).filter((trace) => trace.y.some((value) => value !== 0));
  const widths = doc.bits.map((bits) => `${bits} bits`);
  const xaxis = { type: "category", categoryorder: "array", categoryarray: widths };
  const bars = { bargap: 0.25, bargroupgap: 0.08, showlegend: true, hovermode: "x" };
  return { data, layout: { xaxis, yaxis: { title: "dB" }, ...bars } };
}

/** Output SQNR against the number of tensors that got wide. */
function wideningCurve({ curve, tensors, wide_bits: bits, wide_db: wide }) {
  const label = ({ n, sqnr_db: y }) =>
    `${n} of ${tensors.length}: ${db(y)} dB${n ? `<br>+ ${plain(tensors[n - 1]?.name ?? "")}` : ""}`;
  const line = { ...tracked(curve.map((point) => point.n), curve.map((point) => point.sqnr_db)),
    customdata: curve.map(label) };
  const layout = { xaxis: { title: `tensors at ${bits} bits` }, yaxis: { title: "output SQNR, dB" } };
  if (known(wide)) {
    const style = { color: css("--muted"), dash: "dash", width: 1 };
    layout.shapes = [
      { type: "line", xref: "paper", x0: 0, x1: 1, y0: wide, y1: wide, line: style },
    ];
    layout.annotations = [{ xref: "paper", x: 0, xanchor: "left", y: wide, yanchor: "bottom",
      showarrow: false, text: `all at ${bits} bits: ${db(wide)} dB` }];
  }
  return { data: [line], layout };
}

/** SQNR of the tensors in graph order, and where it first falls out of line. */
function alongGraph(tensors, first) {
  const places = tensors.map((_, i) => i + 1);
  const label = ({ name, op_type: op, sqnr_db: y }) => `${plain(name)} (${plain(op)}): ${db(y)} dB`;
  const data = [{ ...tracked(places, tensors.map((row) => row.sqnr_db)),
    customdata: tensors.map(label) }];
  const layout = { xaxis: { title: "place in the graph" }, yaxis: { title: "SQNR, dB" } };
  const place = first ? tensors.findIndex((row) => row.name === first.name) + 1 : 0;
  if (place && known(first.sqnr_db)) {
    const [bad, side] = [css("--bad"), place < tensors.length / 2 ? "left" : "right"];
    data.push({ x: [place], y: [first.sqnr_db], mode: "markers", hoverinfo: "skip",
      marker: { color: bad, size: 12, symbol: "diamond" } });
    layout.annotations = [{ x: place, y: first.sqnr_db, xanchor: side, ay: 40,
      ax: side === "left" ? 40 : -40, arrowcolor: bad, font: { color: bad },
      text: `${plain(first.name)}<br>${db(first.before_db)} → ${db(first.sqnr_db)} dB` }];
  }
  return { data, layout };
}

function tracked(x, y) {
  const marker = { size: x.length > 40 ? 3 : 6 };
  const line = { color: css("--method-octav"), width: 1.5 };
  return { x, y, mode: "lines+markers", line, marker, hovertemplate: "%{customdata}<extra></extra>" };
}

// --- of one tensor ------------------------------------------------------------------------------

const PLOT_HEIGHT = 320; // .plot in page.css
const BELOW = 50; // what the axis needs of it
const LOWEST = 12; // the first label above the plot, and from label to label
const APART = 17;
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];

/** The values of a tensor, and where the methods clip them. */
function histogram(tensor, results) {
  const { edges, counts } = tensor.histogram;
  const bars = {
    type: "bar",
    x: counts.map((_, i) => (edges[i] + edges[i + 1]) / 2),
    y: counts,
    width: counts.map((_, i) => edges[i + 1] - edges[i]),
    marker: { color: css("--muted"), opacity: 0.55, line: { width: 0 } },
    hovertemplate: "%{x:.4~g}: %{y:,} values<extra></extra>",
  };
  const xaxis = { title: tensor.relative ? "|x| / channel maximum" : "|x|", range: reach(tensor) };
  // From below one value, so that one value is seen.
  const range = [Math.log10(0.7), Math.log10(2 * Math.max(...counts, 1))];
  const yaxis = { type: "log", dtick: Math.ceil(range[1] / 6), range, title: "values per bin" };
  return { data: [bars], layout: { xaxis, yaxis, bargap: 0, ...flagpoles(tensor, results) } };
}

/** What each clipping scalar costs: measured, by the model, its minima, and the methods' choices. */
function errorCurve(tensor, results, { measured: errors, model, minima, second }) {
  const [ink, muted, bad] = ["--ink", "--muted", "--bad"].map(css);
  const hovertemplate = "s = %{x:.4~g}: %{y:.4~g}";
  const marks = (name, points, marker) => ({ name, mode: "markers", marker, hovertemplate,
    x: points.map((point) => point.s), y: points.map((point) => point.mse) });
  const line = { x: tensor.s, mode: "lines", hovertemplate };
  const data = [
    { ...line, y: errors, name: "measured", line: { color: ink, width: 2 } },
    { ...line, y: model, name: "model J(s)", line: { color: muted, width: 2, dash: "dash" } },
    marks("minimum", minima, { color: ink, size: 8 }),
  ];
  if (second) {
    const open = { color: bad, size: 13, symbol: "diamond-open", line: { width: 2 } };
    data.push(marks("candidate", [second.small, second.large], open));
  }
  const title = tensor.relative ? "clipping scalar s / channel maximum" : "clipping scalar s";
  const { low, high } = span([...errors, ...model].filter((error) => error > 0));
  const decades = Math.log10(high / low);
  // Within two decades, ticks at 2 and 5 too.
  const dtick = decades < 2 ? "D2" : Math.ceil(decades / 6);
  const yaxis = { type: "log", dtick, title: "mean squared error" };
  const layout = { xaxis: { title, range: reach(tensor) }, yaxis, ...flagpoles(tensor, results) };
  return { data, layout };
}

/** The same for both charts of a tensor, so that they can be read as one. */
function reach(tensor) {
  return [0, 1.02 * (tensor.histogram?.edges.at(-1) ?? (tensor.relative ? 1 : tensor.max_abs))];
}

/** Lines at the thresholds, like flagpoles: each label has a height of its own. */
function flagpoles(tensor, results) {
  const flags = results.filter(({ threshold }) => known(threshold));
  flags.sort((a, b) => a.threshold - b.threshold);
  const above = LOWEST + APART * flags.length;
  const height = (pixels) => 1 + pixels / (PLOT_HEIGHT - above - BELOW);
  const middle = reach(tensor)[1] / 2;
  const left = flags.filter(({ threshold }) => threshold < middle).length;
  const [shapes, annotations] = [[], []];
  flags.forEach((flag, i) => {
    // On the left, labels stand to the right of poles that get lower; on the right, mirrored.
    const pixels = APART * (i < left ? left - 1 - i : i);
    const color = colorOf(flag.method);
    const [bottom, top, label] = [pixels + 1, pixels + 4, pixels + LOWEST].map(height);
    shapes.push(pole(flag, color, label), ...bands(flag, color, [bottom, top]));
    annotations.push({ x: flag.threshold, yref: "paper", y: label, yanchor: "middle",
      xanchor: i < left ? "left" : "right", showarrow: false, font: { size: 11, color },
      bgcolor: css("--surface"), borderpad: 0,
      text: `${plain(flag.method)} ${figures(flag.threshold)}` });
  });
  return { shapes, annotations, margin: { t: above } };
}

function pole({ method, threshold: x }, color, top) {
  const dash = DASHES[doc.methods.indexOf(method) % DASHES.length];
  const line = { color, dash, width: 1.5 };
  return { type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: top, line };
}

/** From the lowest to the highest threshold of all channels: across the plot, and under the label. */
function bands({ low, high }, fillcolor, [y0, y1]) {
  if (!(high > low)) return [];
  const band = { type: "rect", yref: "paper", x0: low, x1: high, fillcolor, line: { width: 0 } };
  return [{ ...band, y0: 0, y1: 1, opacity: 0.05, layer: "below" }, { ...band, y0, y1, opacity: 0.8 }];
}
