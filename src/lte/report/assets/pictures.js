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

/* Marks items of a picture that is drawn; at once, without drawing it anew. */
function pointOut(picture, seriesIndex, dataIndex) {
  if (!picture.chart) return;
  picture.chart.dispatchAction({ type: 'downplay', seriesIndex });
  if (dataIndex !== null) picture.chart.dispatchAction({ type: 'highlight', seriesIndex, dataIndex });
}

/* The whole text at once: columns are tokens, in a long text several to a column, rows are layers. */
function layerMap(state, run) {
  const routing = state.routings[run];
  let group = 1;
  const groups = () => upTo(Math.ceil(routing.length / group));
  const mean = (layer, column) => meanOf(upTo(Math.min(group, routing.length - column * group))
    .map((offset) => routing.count(layer, column * group + offset)));
  const words = (column) => {
    const [first, last] = [column * group, Math.min((column + 1) * group, routing.length) - 1];
    return group === 1 ? `token ${first + 1}, ${routing.list.label(first)}` : `tokens ${first + 1} to ${last + 1}`;
  };
  const layerMean = (layer) => meanOf(routing.counts.subarray(layer * routing.length, (layer + 1) * routing.length))
    / routing.experts;
  const picture = new Shell.Picture({
    label: `${nameOf(state, run)}Map of the experts that are on, by layer and token`,
    caption: 'A column is a token (in a long text the mean of a few) and a row a layer, the first on top; the fuller ' +
      'the colour, the more of the layer’s experts are on. The bars are each layer’s mean.',
    height: () => Math.max(routing.layers * 8, 60) + 70,
    onPick: ({ seriesIndex, value }) => {
      if (seriesIndex === 0) state.set({ run, layer: value[1], token: busiest(value[0]) });
    },
    options: (width) => {
      group = Math.ceil(routing.length / Math.max(Math.floor((width - 160) / 3), 20));
      queueMicrotask(follow);
      return {
        grid: [{ left: LEFT, right: 100, top: 26, bottom: 42 }, { right: 10, width: 76, top: 26, bottom: 42 }],
        tooltip: Shell.tooltip(({ seriesIndex, value, dataIndex }) => (seriesIndex === 1
          ? `layer ${dataIndex}: ${Shell.percent(value)} on`
          : `${words(value[0])}\nlayer ${value[1]}: ${value[2].toFixed(group > 1 ? 1 : 0)} of ${routing.experts} ` +
            `experts on`)),
        xAxis: [Shell.axis({ type: 'category', name: 'token', nameLocation: 'middle', nameGap: 26,
          data: groups().map((column) => String(column * group + 1)) }),
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
      .map((layer) => `layer ${layer}`)], groups().map((column) => [column * group + 1, { words: words(column) },
      Shell.percent(meanOf(upTo(routing.layers).map((layer) => mean(layer, column))) / routing.experts),
      ...upTo(routing.layers).map((layer) => mean(layer, column).toFixed(group > 1 ? 1 : 0))])],
  });
  function busiest(column) {
    const own = routing.totals.slice(column * group, (column + 1) * group);
    return column * group + own.indexOf(Math.max(...own));
  }
  function follow() {
    const token = state.at(run);
    pointOut(picture, 0, token === null ? null
      : upTo(routing.layers).map((layer) => Math.floor(token / group) * routing.layers + layer));
  }
  state.onChange(['run', 'token'], follow);
  return picture;
}

/* Of tokens that are in both texts, or of both models, B less A. */
function differenceBars(state) {
  const pairs = state.partners[0].map((partner, token) => [token, partner]).filter(([, partner]) => partner >= 0);
  const shares = () => state.routings.map((routing) => routing.shares(state.step));
  const told = ([a]) => state.routings[0].list.label(a);
  let values = [];
  const picture = new Shell.Picture({
    label: 'Bars of the difference in neurons used, B less A, by token',
    caption: 'A bar is a token that both read, in the order of A: above the line B uses more of its neurons for it, ' +
      'below less.',
    height: () => 190,
    onPick: ({ dataIndex }) => state.set({ run: 0, token: pairs[dataIndex][0] }),
    options: () => {
      const [first, second] = shares();
      values = pairs.map(([a, b]) => second[b] - first[a]);
      return {
        grid: { left: 60, right: 12, top: 14, bottom: 42 },
        tooltip: Shell.tooltip(({ dataIndex, value }) =>
          `${told(pairs[dataIndex])}: ${value > 0 ? '+' : '−'}${points(Math.abs(value))}`),
        xAxis: Shell.axis({ type: 'category', name: 'token of A', nameLocation: 'middle', nameGap: 26,
          data: pairs.map(([a]) => String(a + 1)), axisLine: { onZero: false } }),
        yAxis: shareAxis({ axisLabel: { formatter: (value) => `${Math.round(100 * value)}` }, name: 'points',
          nameLocation: 'middle', nameGap: 40 }),
        series: [{ type: 'bar', emphasis: { itemStyle: { color: Shell.colour('mark') } }, data: values.map((value) =>
          ({ value, itemStyle: { color: Shell.colour(value < 0 ? 'less' : 'more') } })) }],
      };
    },
    rows: () => ['Neurons used by token', ['token of A', { words: 'text' }, 'A', 'B', 'B less A'],
      pairs.map(([a, b], place) => [a + 1, { words: told([a, b]) }, Shell.percent(shares()[0][a]),
        Shell.percent(shares()[1][b]), points(values[place])])],
  });
  state.onChange(['step'], () => picture.drawSoon());
  state.onChange(['run', 'token'], () => {
    const place = pairs.findIndex(([a]) => a === state.at(0));
    pointOut(picture, 0, place < 0 ? null : place);
  });
  return picture;
}

/* The share of the neurons that each token uses against its surprise, and against the entropy of what comes next. */
function whyScatter(state) {
  const kinds = [['surprise', 'surprise of the token, bits'], ['entropy', 'entropy of what comes next, bits']];
  /* The first token follows nothing. */
  const data = (routing, kind) => Array.from(routing[kind], (value, token) =>
    [value, routing.totals[token] / routing.all, token]).slice(kind === 'surprise' ? 1 : 0);
  const correlation = (routing, kind) => {
    const found = data(routing, kind);
    return spearman(found.map(([x]) => x), found.map(([, y]) => y));
  };
  const sentence = state.routings.map((routing, run) => `${nameOf(state, run)}${kinds.map(([kind]) => {
    const rho = correlation(routing, kind);
    return `with ${kind} ${Number.isNaN(rho) ? 'none, of too few tokens' : rho.toFixed(2).replace('-', '−')}`;
  }).join(', ')}`).join('; ');
  const picture = new Shell.Picture({
    label: 'Points of the neurons used by each token over its surprise and over the entropy of what comes next',
    caption: 'A point is a token. Left, how surprising the token was; right, how open the model finds what comes ' +
      `next; the height is the share of its neurons it used. Rank correlation (Spearman): ${sentence}.`,
    height: (width) => (width < 560 ? 470 : 270),
    onPick: ({ value, seriesIndex }) => state.set({ run: seriesIndex >> 1, token: value[2] }),
    options: (width) => {
      const narrow = width < 560;
      queueMicrotask(follow);
      return {
        grid: kinds.map((_, index) => (narrow ? { left: LEFT, right: 14, top: 14 + 235 * index, height: 170 }
          : { left: index ? '56%' : LEFT, right: index ? 14 : '52%', top: 14, bottom: 46 })),
        tooltip: Shell.tooltip(({ value: [x, share, token], seriesIndex }) =>
          `${state.routings[seriesIndex >> 1].list.label(token)}\n${bits(x)}, ${Shell.percent(share)} of the neurons`),
        xAxis: kinds.map(([, name], index) => Shell.axis({ type: 'value', gridIndex: index, name,
          nameLocation: 'middle', nameGap: 28, splitNumber: 4 })),
        yAxis: kinds.map((_, index) => shareAxis({ gridIndex: index, scale: true })),
        series: state.routings.flatMap((routing, run) => kinds.map(([kind], index) => ({ type: 'scatter',
          name: `${nameOf(state, run)}${kind}`, symbol: SIDES[run][1], symbolSize: 7, data: data(routing, kind),
          xAxisIndex: index, yAxisIndex: index, color: Shell.colour(SIDES[run][0]), itemStyle: { opacity: 0.55 },
          emphasis: { scale: 1.8, itemStyle: { color: Shell.colour('mark'), opacity: 1 } } }))),
      };
    },
    rows: () => ['Neurons used, surprise and entropy by token', ['token', { words: 'text' }, 'neurons used',
      'surprise, bits', 'entropy of the next, bits'],
      state.routings.flatMap((routing, run) => upTo(routing.length).map((token) => [`${nameOf(state, run)}${token + 1}`,
        { words: routing.list.label(token) }, Shell.percent(routing.totals[token] / routing.all),
        token ? routing.surprise[token].toFixed(2) : '', routing.entropy[token].toFixed(2)]))],
  });
  function follow() {
    state.routings.forEach((_, run) => kinds.forEach(([kind], index) => {
      const token = state.at(run);
      const place = token === null ? -1 : token - (kind === 'surprise' ? 1 : 0);
      pointOut(picture, 2 * run + index, place < 0 ? null : place);
    }));
  }
  state.onChange(['run', 'token'], follow);
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
      x: { name: 'threshold of the router’s score' }, y: { name: 'of the dense model', share: true, min: 0, max: 1 },
      marks: [{ xAxis: thresholds[own], label: 'own' }, ...(state.step === null ? []
        : [{ xAxis: thresholds[Math.min(state.step, thresholds.length - 1)], label: 'slider' }])],
      tell: ({ line, x, y }) => `threshold ${x.toFixed(3)}: ${Shell.percent(y)} of ${line}`,
      lines: lines.map(([name, shade, value], place) => ({ name, colour: Shell.colour(shade), size: 4,
        symbol: Charts.symbol(place), dash: Charts.dash(place),
        points: thresholds.map((x, step) => ({ x, y: value(shares[step]) })) })),
    }),
    rows: () => ['By threshold', ['threshold', ...lines.map(([name]) => name)], thresholds.map((threshold, step) =>
      [`${threshold.toFixed(3)}${step === own ? ' (own)' : ''}`,
        ...lines.map(([, , value]) => Shell.percent(value(shares[step])))])],
  });
  state.onChange(['step'], () => picture.drawSoon());
  return picture;
}
