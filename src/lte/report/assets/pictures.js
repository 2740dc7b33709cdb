'use strict';
/* The pictures of a text as a whole: its map, what goes with surprise, and what other thresholds would cost. */

/* Room for the labels of a vertical axis. */
const LEFT = 46;
const SIDES = [['on', 'circle'], ['second', 'diamond']];

const layerAxis = (layers, settings = {}) => Shell.axis({ type: 'category', data: upTo(layers).map(String),
  inverse: true, name: 'layer', nameLocation: 'start', ...settings });
const shareAxis = (settings = {}) => Shell.axis({ type: 'value', splitNumber: 4,
  axisLabel: { formatter: (value) => Shell.percent(value, 0) }, ...settings });
const nameOf = (state, run) => (state.routings.length > 1 ? `${'AB'[run]}: ` : '');

/* The whole text at once: columns are tokens, in a long text several to a column, rows are layers. */
function layerMap(state, run) {
  const routing = state.routings[run];
  /* Tokens of a column, by the width that the picture was drawn for last. */
  const group = () => Math.ceil(routing.length / Math.max(Math.floor((picture.width - 160) / 4), 20));
  const groups = () => upTo(Math.ceil(routing.length / group()));
  const counts = (layer) => routing.counts.subarray(layer * routing.length, (layer + 1) * routing.length);
  const mean = (layer, column) => meanOf(counts(layer).subarray(column * group(), (column + 1) * group()));
  const words = (column) => {
    const [first, last] = [column * group(), Math.min((column + 1) * group(), routing.length) - 1];
    return group() === 1 ? `token ${first + 1}, ${routing.list.label(first)}` : `tokens ${first + 1} to ${last + 1}`;
  };
  const layerMean = (layer) => meanOf(counts(layer)) / routing.experts;
  const picture = new Shell.Picture({
    label: `${nameOf(state, run)}Map of the experts that are on, by layer and token`,
    caption: 'A column is a token (in a long text the mean of a few) and a row a layer, the first on top; the fuller ' +
      'the colour, the more of the layer’s experts are on. The bars are each layer’s mean.',
    height: () => Math.max(routing.layers * 8, 60) + 70,
    chosen: () => upTo(state.at(run) === null ? 0 : routing.layers).map((layer) => (
      { seriesIndex: 0, dataIndex: Math.floor(state.at(run) / group()) * routing.layers + layer })),
    onPick: ({ seriesIndex, value }) => {
      if (seriesIndex === 0) state.set({ run, layer: value[1], token: busiest(value[0]) });
    },
    options: () => {
      return {
        grid: [{ left: LEFT, right: 100, top: 26, bottom: 42 }, { right: 10, width: 76, top: 26, bottom: 42 }],
        tooltip: Shell.tooltip(({ seriesIndex, value, dataIndex }) => (seriesIndex === 1
          ? `layer ${dataIndex}: ${Shell.percent(value)} on`
          : `${words(value[0])}\nlayer ${value[1]}: ${value[2].toFixed(group() > 1 ? 1 : 0)} of ${routing.experts} ` +
            `experts on`)),
        xAxis: [Shell.axis({ type: 'category', name: 'token', nameLocation: 'middle', nameGap: 26,
          data: groups().map((column) => String(column * group() + 1)) }),
        shareAxis({ gridIndex: 1, min: 0, max: 1, interval: 1,
          axisLabel: { showMinLabel: false, formatter: (value) => Shell.percent(value, 0) } })],
        yAxis: [layerAxis(routing.layers),
          layerAxis(routing.layers, { gridIndex: 1, name: '', axisLabel: { show: false } })],
        visualMap: { show: false, seriesIndex: 0, min: 0, max: routing.experts, dimension: 2,
          inRange: { color: [Shell.colour('off'), Shell.colour('on')] } },
        series: [{ type: 'heatmap', progressive: 0,
          emphasis: { itemStyle: { borderColor: Shell.colour('mark'), borderWidth: 1 } },
          data: groups().flatMap((column) =>
            upTo(routing.layers).map((layer) => [column, layer, mean(layer, column)])) },
        { type: 'bar', xAxisIndex: 1, yAxisIndex: 1, color: Shell.colour('on'),
          data: upTo(routing.layers).map(layerMean) }],
      };
    },
    rows: () => ['Experts on, by token (row) and layer (column)', ['tokens', { words: 'text' }, 'neurons used',
      ...upTo(routing.layers)
      .map((layer) => `layer ${layer}`)], groups().map((column) => [column * group() + 1, { words: words(column) },
      Shell.percent(meanOf(upTo(routing.layers).map((layer) => mean(layer, column))) / routing.experts),
      ...upTo(routing.layers).map((layer) => mean(layer, column).toFixed(group() > 1 ? 1 : 0))])],
  });
  function busiest(column) {
    const own = routing.totals.slice(column * group(), (column + 1) * group());
    return column * group() + own.indexOf(Math.max(...own));
  }
  state.onChange(['run', 'token'], () => picture.mark());
  return picture;
}

/* Of tokens that are in both texts, or of both models, B less A. */
function differenceBars(state) {
  const pairs = state.partners[0].map((partner, token) => [token, partner]).filter(([, partner]) => partner >= 0);
  const label = (a) => state.routings[0].list.label(a);
  const known = () => {
    const [first, second] = state.routings.map((routing) => routing.shares(state.step));
    return pairs.map(([a, b]) => ({ a, first: first[a], second: second[b], value: second[b] - first[a] }));
  };
  const picture = new Shell.Picture({
    label: 'Bars of the difference in neurons used, B less A, by token',
    caption: 'A bar is a token that both read, in the order of A: above the line B uses more of its neurons for it, ' +
      'below less.',
    height: () => 190,
    chosen: () => [{ seriesIndex: 0, dataIndex: pairs.findIndex(([a]) => a === state.at(0)) }],
    onPick: ({ data }) => state.set({ run: 0, token: data.a }),
    options: () => ({
      grid: { left: 60, right: 12, top: 14, bottom: 42 },
      tooltip: Shell.tooltip(({ data: { a, value } }) =>
        `${label(a)}: ${value > 0 ? '+' : '−'}${points(Math.abs(value))}`),
      xAxis: Shell.axis({ type: 'category', name: 'token of A', nameLocation: 'middle', nameGap: 26,
        data: pairs.map(([a]) => String(a + 1)), axisLine: { onZero: false } }),
      yAxis: shareAxis({ axisLabel: { formatter: (value) => `${Math.round(100 * value)}` }, name: 'points',
        nameLocation: 'middle', nameGap: 40 }),
      series: [{ type: 'bar', emphasis: { itemStyle: { color: Shell.colour('mark') } }, data: known().map((found) =>
        ({ ...found, itemStyle: { color: Shell.colour(found.value < 0 ? 'less' : 'more') } })) }],
    }),
    rows: () => ['Neurons used by token', ['token of A', { words: 'text' }, 'A', 'B', 'B less A'],
      known().map(({ a, first, second, value }) => [a + 1, { words: label(a) }, Shell.percent(first),
        Shell.percent(second), points(value)])],
  });
  state.onChange(['step'], () => picture.drawSoon());
  state.onChange(['run', 'token'], () => picture.mark());
  return picture;
}

/* The share of the neurons that each token uses against its surprise, or the entropy of what comes next. */
function whyScatter(state, kind, name, caption) {
  /* The first token follows nothing. */
  const first = kind === 'surprise' ? 1 : 0;
  const tokens = state.routings.map((routing) => upTo(routing.length).slice(first));
  const share = (routing, token) => routing.totals[token] / routing.all;
  const correlations = state.routings.map((routing, run) => {
    const rho = spearman(routing[kind].subarray(first), tokens[run].map((token) => share(routing, token)));
    const words = Number.isNaN(rho) ? 'none, of too few tokens' : rho.toFixed(2).replace('-', '−');
    return `${nameOf(state, run)}with ${kind} ${words}`;
  });
  const picture = Charts.linePicture({
    label: `Points of the neurons used by each token over ${kind}`,
    caption: `A point is a token${tokens.length > 1 ? ', a diamond one of B' : ''}: ${caption}; the height is the ` +
      `share of its neurons it used. Rank correlation (Spearman) ${correlations.join('; ')}.`,
    height: () => 270,
    chosen: () => tokens.map((all, run) => ({ seriesIndex: run, dataIndex: all.indexOf(state.at(run)) })),
    onPick: ({ data: { run, token } }) => state.set({ run, token }),
    describe: () => ({
      x: { name }, y: { name: 'neurons used', share: true },
      tell: ({ run, token, x, y }) =>
        `${state.routings[run].list.label(token)}\n${bits(x)}, ${Shell.percent(y)} of the neurons`,
      lines: state.routings.map((routing, run) => ({ name: 'AB'[run], hidden: true, scatter: true, size: 7,
        colour: Shell.colour(SIDES[run][0]), symbol: SIDES[run][1], opacity: 0.55,
        points: tokens[run].map((token) => ({ x: routing[kind][token], y: share(routing, token), run, token })) })),
    }),
    rows: () => [`Neurons used and ${kind} by token`, ['token', { words: 'text' }, 'neurons used', name],
      state.routings.flatMap((routing, run) => tokens[run].map((token) => [`${nameOf(state, run)}${token + 1}`,
        { words: routing.list.label(token) }, Shell.percent(share(routing, token)), routing[kind][token].toFixed(2)]))],
  });
  state.onChange(['run', 'token'], () => picture.mark());
  return picture;
}

/* What the whole text would cost at other thresholds, with the scores as they are. */
function whatIfCurve(state, run) {
  const routing = state.routings[run];
  const { thresholds, own } = routing.what_if;
  const shares = thresholds.map((_, step) => meanOf(routing.shares(step)));
  const lines = [['FFN neurons', 'on', (share) => share], ['FLOPs', 'second', (share) => routing.work('flops', share)],
    ['bytes read', 'quiet', (share) => routing.work('bytes', share)]];
  const picture = Charts.linePicture({
    label: `${nameOf(state, run)}Lines of what the text would use and cost over the router’s threshold`,
    caption: 'Over the threshold: the share of the FFN neurons that a token of this text would use, and its work ' +
      'over that of the dense model, block by block without head and attention scores. The dashed lines are the ' +
      'model’s own threshold and the slider’s.',
    height: () => 250,
    onPick: ({ dataIndex }) => state.set({ step: dataIndex === own ? null : dataIndex }),
    describe: () => ({
      x: { name: 'threshold of the router’s score' }, y: { name: 'of the dense model', share: true, min: 0 },
      marks: [{ xAxis: thresholds[own], label: 'own' }, ...(state.step === null ? []
        : [{ xAxis: thresholds[Math.min(state.step, thresholds.length - 1)], label: 'slider' }])],
      tell: ({ line, x, y }) => `threshold ${x.toFixed(3)}: ${Shell.percent(y)} of ${line}`,
      lines: lines.map(([name, shade, value], place) => ({ name, colour: Shell.colour(shade), size: 4,
        ...Charts.look(place), points: thresholds.map((x, step) => ({ x, y: value(shares[step]) })) })),
    }),
    rows: () => ['By threshold', ['threshold', ...lines.map(([name]) => name)], thresholds.map((threshold, step) =>
      [`${threshold.toFixed(3)}${step === own ? ' (own)' : ''}`,
        ...lines.map(([, , value]) => Shell.percent(value(shares[step])))])],
  });
  state.onChange(['step'], () => picture.drawSoon());
  return picture;
}
