'use strict';
/* Inside the models of a task, layer by layer, and what lte bench timed: each a list of pictures, those with data. */

const PERCENT = { share: true, min: 0, max: 1 };
const THIN = { hidden: true, pale: true, size: 0 };

/* A panel with a choice above a picture of lines; describe gets what is chosen. Without entries there is none. */
function choicePanel(title, label, entries, describe, options = {}) {
  if (!entries.length) return null;
  const { element, choice } = Shell;
  let chosen = null;
  const said = element('p', { class: 'quiet', role: 'status' });
  const picture = Charts.linePicture({ label: title, describe: () => describe(chosen), ...options });
  const choose = (value) => {
    chosen = value;
    said.textContent = options.say?.(value) ?? '';
    picture.draw();
  };
  const list = choice(label, entries, choose, { name: options.name });
  choose(list.value);
  return element('div', { class: 'panel' }, element('h3', {}, title),
    element('div', { class: 'controls' }, list.box), said, picture.box);
}

/* The mean over the seeds of a point, layer by layer. */
function layerMeans(point) {
  const measured = point.runs.map((run) => run.routing?.active_fraction).filter(Boolean);
  return Array.from({ length: Math.max(0, ...measured.map((shares) => shares.length)) }, (_, layer) =>
    mean(measured.map((shares) => shares[layer]).filter(Charts.isNumber)));
}

const byLayer = (values) => values.map((y, x) => ({ x, y })).filter(({ y }) => Charts.isNumber(y));
const layerAxis = (count) => ({ name: 'layer', whole: true, min: 0, max: Math.max(count - 1, 1), label: String });

function layerPanels(comparison) {
  /* The curve of LTE first, of its points that of most seeds. */
  const rank = (point) => (point.is_main && point.method === 'lte' ? point.runs.length : 0);
  const points = [...comparison.points].sort((a, b) => rank(b) - rank(a));
  const runsWith = (test) => points.flatMap((point) => point.runs.filter(test)
    .map((run) => [`${titleOf(point)}, seed ${run.seed}`, run]));
  const curves = [...Map.groupBy(points.filter((point) => layerMeans(point).length), (point) => point.curve)];
  const routed = runsWith(({ routing }) => routing?.histogram);
  const counted = runsWith(({ routing }) => routing?.dead);
  return [
    choicePanel('Share of neurons computed, by layer', 'Method', curves, (found) => ({
      x: layerAxis(layerMeans(found[0]).length), y: { ...PERCENT, name: 'neurons computed' },
      tell: ({ line, x, y }) => `${Charts.clip(line)}\nlayer ${x}: ${Charts.share(y)} computed`,
      lines: found.map((point, place) => ({ name: titleOf(point), ...Charts.look(place), size: 7,
        label: found.some((other) => other !== point && other.target === point.target) ? point.name
          : `target ${Charts.share(point.target)}`,
        colour: Charts.colourOf(point.method), points: byLayer(layerMeans(point)) })),
    }), { caption: 'After training, mean over seeds: the lower, the more of a layer is skipped.' }),
    choicePanel('Over the training', 'Run', runsWith((run) => run.history),
      ({ history: { step, active_fraction: shares } }) => ({
      x: { name: 'step', whole: true }, y: { ...PERCENT, name: 'neurons computed' },
      tell: ({ line, x, y }) => `${line}, step ${x}: ${Charts.share(y)} computed`,
      lines: [...shares[0].map((_, layer) => ({ ...THIN, name: `layer ${layer}`, width: 1.5, opacity: 0.7,
        colour: Shell.ramp()[2 + Math.round((7 * layer) / shares[0].length)],
        points: byLayer(shares.map((layers) => layers[layer])).map(({ x, y }) => ({ x: step[x], y })) })),
      { name: 'all layers', colour: Shell.colour('on'), width: 4, size: 0,
        points: shares.map((layers, at) => ({ x: step[at], y: mean(layers.filter(Charts.isNumber)) })) }],
    }), { caption: 'A thin line is a layer, the later ones stronger, and the thick one their mean.' }),
    choicePanel('Router scores around the threshold', 'Run', routed, ({ routing: { histogram, threshold } }) => {
      const unit = Shell.data.histogram_unit;
      const bins = histogram[0].length;
      const bars = (units) => units.map((count, bin) => ({ x: (bin + 0.5) / bins, y: (count ?? 0) * unit }));
      return { x: { name: 'router score', min: 0, max: 1, interval: 0.1, label: (value) => value.toFixed(1) },
        y: { name: 'share of the scores', share: true, min: 0 },
        tell: ({ line, x, y }) =>
          `${line}\nscore ${(x - 0.5 / bins).toFixed(3)} to ${(x + 0.5 / bins).toFixed(3)}: ${Charts.share(y, 2)}`,
        marks: [{ xAxis: threshold ?? 0.5, label: `on above ${Charts.short(threshold ?? 0.5)}` }],
        lines: [{ name: 'all layers', colour: Shell.colour('on'), size: 0, area: true,
          points: bars(histogram[0].map((_, bin) => mean(histogram.map((layer) => layer[bin] ?? 0)))) },
          ...histogram.map((units, layer) => ({ ...THIN, name: `layer ${layer}`, width: 1, opacity: 0.3,
            colour: Shell.colour('quiet'), points: bars(units) }))] };
    }, { caption: 'An expert is computed for a token where its score lies right of the dashed line; few scores near ' +
      'it are a clear choice. Thin lines are single layers.' }),
    choicePanel('Experts that are never and always on', 'Run', counted, ({ routing: { dead, always_on: always } }) => ({
      x: layerAxis(dead.length), y: { name: 'experts', whole: true, min: 0 },
      tell: ({ line, x, y }) => `layer ${x}: ${y} experts ${line}`,
      lines: [['never on', dead, 'less'], ['always on', always, 'more']].map(([name, values, shade], place) =>
        ({ name, colour: Shell.colour(shade), symbol: Charts.look(place).symbol, points: byLayer(values) })),
    }), { say: ({ routing: { dead, always_on: always, experts, tokens } }) => {
      const sum = (values) => Shell.count(values.reduce((total, value) => total + value, 0));
      const on = tokens ? ` on ${Shell.count(tokens)} tokens` : '';
      return `Of ${sum(experts)} experts ${sum(dead)} were never used${on}, and ${sum(always)} by every token.`;
    }, caption: 'Both are capacity that routing does not use.' }),
  ].filter(Boolean);
}

/* The bytes of one sparse implementation, the last of ours: others read as many, or more. */
function bytesAlone(rows, factor) {
  const sparse = rows.filter((row) => !row.is_dense && Charts.isNumber(row.bandwidth_ms));
  const name = (sparse.findLast(({ provider }) => provider.startsWith('lte')) ?? sparse.at(-1))?.provider;
  return sparse.filter(({ provider }) => provider === name).map((row) =>
    ({ x: row.sparsity, y: row.bandwidth_ms * factor })).sort((a, b) => a.x - b.x);
}

function describeLatency({ rows }) {
  const timed = rows.filter((row) => Charts.isNumber(row.median_ms));
  const times = timed.map((row) => row.median_ms);
  const [factor, unit] = Math.max(...times) < 1 ? [1000, 'µs'] : [1, 'ms'];
  const groups = [...Map.groupBy(timed, ({ provider }) => provider)];
  const alone = bytesAlone(rows, factor);
  /* Where times are too far apart for a linear axis. */
  const far = Math.max(...times) / Math.min(...times);
  const base = far > 300 ? 10 : far > 8 ? 2 : undefined;
  return {
    x: { ...PERCENT, name: 'FFN sparsity' },
    y: { name: `median time in ${unit}`, log: base, min: base ? undefined : 0 },
    tell: ({ line, x, y, low, high, own }) => {
      const range = low === undefined ? '' : ` (${Charts.short(low)} to ${Charts.short(high)})`;
      const what = own === undefined ? 'the time that the bytes alone take' : own || `${Charts.share(x)} sparsity`;
      return `${line}\n${what}\n${Charts.short(y)} ${unit}${range}`;
    },
    lines: [...groups.map(([name, found], place) => ({ name, ...Charts.look(place), size: 8,
      colour: Charts.colourOf(name), width: name.startsWith('lte') ? 3 : 2,
      level: found.every((row) => row.is_dense) ? found[0].median_ms * factor : undefined,
      points: found.map((row) => ({ x: row.sparsity, y: row.median_ms * factor, low: row.p20_ms * factor,
        high: row.p80_ms * factor, own: row.own })).sort((a, b) => a.x - b.x) })),
    ...(alone.length ? [{ name: 'bytes alone', colour: Shell.colour('ink'), dash: 'dashed', size: 0, points: alone }]
      : [])],
  };
}

/* Ratios or shares by batch; lines: [name, points, dash]. */
function describeBatches(lines, y, marks = []) {
  const all = lines.flatMap(([, points]) => points.map(({ x }) => x));
  return { x: { name: 'batch: texts decoded together', log: Math.min(...all) < Math.max(...all) ? 2 : undefined,
    min: Math.min(...all), label: String }, y, marks,
    tell: ({ line, x, y: value }) => `${line}\nbatch ${x}: ${y.share ? Charts.share(value) : Charts.short(value)}`,
    lines: lines.map(([name, points, dash], place) => ({ name, points, dash, symbol: Charts.look(place).symbol,
      colour: Shell.ramp()[4 + Math.round((5 * place) / Math.max(lines.length - 1, 1))] })) };
}

/* What was timed: whole steps before single FFNs, then the most sparsities. */
function speedPanels(benches) {
  const rank = ({ title, rows }) => 1000 * title.startsWith('decoding') +
    new Set(rows.map(({ sparsity }) => sparsity)).size;
  const groups = benches.flatMap(({ latency }) => latency).filter(({ rows }) =>
    rows.some((row) => Charts.isNumber(row.median_ms)))
    .sort((a, b) => rank(b) - rank(a));
  const unions = benches.filter(({ union }) => union.length).sort((a, b) => b.union.length - a.union.length);
  const batches = ({ break_even: found }) => Math.max(0, ...found.map((row) => row.batches.length));
  const evens = benches.filter(batches).sort((a, b) => batches(b) - batches(a));
  return [
    choicePanel('Measured time against sparsity', 'Measurement', groups.map((group) => [group.title, group]),
      describeLatency, { name: 'timed', height: () => 440,
      caption: 'Medians, with bars from the 20th to the 80th percentile. The dashed line is how long reading the ' +
        'needed weights alone takes at the speed at which the machine copies memory, which a model that fits a cache ' +
        'can beat. Dense implementations are level lines.' }),
    choicePanel('Weights that all texts of a batch can skip', 'Measurement', unions.map((bench) => [bench.name, bench]),
      ({ union }) => describeBatches([
      ['measured', union.map((row) => ({ x: row.batch, y: 1 - row.union }))],
      ['if independent', union.filter((row) => Charts.isNumber(row.independent))
        .map((row) => ({ x: row.batch, y: 1 - row.independent })), 'dashed'],
    ], { ...PERCENT, name: 'share skipped by all' }),
      { caption: 'What one text of a batch needs must be read for all of them; the second line is what it would be ' +
        'if texts chose independently.' }),
    choicePanel('Batches against the fastest dense implementation', 'Measurement',
      evens.map((bench) => [bench.name, bench]), ({ break_even: rows }) => describeBatches(
        rows.map((row) => [`${row.benchmark}, ${row.setting}`,
          row.batches.map((batch, place) => ({ x: batch, y: row.ratios[place] }))]),
        { name: 'time over dense', min: 0 }, [{ yAxis: 1, label: 'as fast as dense' }]), {
        say: ({ break_even: rows }) => rows.map((row) => `${row.benchmark}, ${row.setting}: ${row.break_even === null
          ? `faster than dense up to batch ${row.batches.at(-1)}, the largest measured`
          : `no longer faster than dense from batch ${row.break_even}`}.`).join(' '),
      caption: 'Below the dashed line the sparse model is faster than the dense one.' }),
  ].filter(Boolean);
}
