'use strict';
/* Pictures from a description: lines of points on two axes, with names at their ends; or a row for each name. */
const Charts = (() => {
  const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);
  const short = (value) => (isNumber(value) ? String(Number(value.toPrecision(3))) : '-');
  const clip = (text, length = 48) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
  /* Shares, with the decimals that tell neighbouring ticks apart. */
  const share = (value, digits = 1) => (isNumber(value) ? `${Number((100 * value).toFixed(digits))}%` : '-');
  const form = ({ share: isShare }) => (isShare ? share : short);
  const SYMBOLS = ['circle', 'rect', 'triangle', 'diamond', 'path://M1 2H19L10 19Z',
    'path://M7 1H13V7H19V13H13V19H7V13H1V7H7Z',
      'path://M10 0L12.5 7H20L14 11.5L16.5 19L10 14.5L3.5 19L6 11.5L0 7H7.5Z'];
  const DASHES = ['solid', 'dashed', 'dotted', [9, 3, 2, 3]];
  const symbol = (place) => SYMBOLS[place % SYMBOLS.length];
  const dash = (place) => DASHES[place % DASHES.length];
  /* What is no method, a setting say: by its place among `count`, in the stronger half of the ramp. */
  const shade = (place, count) => Shell.ramp()[4 + Math.round((5 * place) / Math.max(count - 1, 1))];
  /* A method's or an implementation's colour. */
  const colourOf = (name) => Shell.colour(Shell.data.colours[name] ?? 'quiet');

  /* An axis: { name, share, log, inverse, min, max, interval, whole, label }. */
  function axis({ name, log, min, max, interval, inverse, whole, ...rest }, isX) {
    const label = rest.label ?? form(rest);
    return Shell.axis({ type: log ? 'log' : 'value', logBase: log, inverse, min, max, interval,
      minInterval: whole ? 1 : undefined,
      name: log ? `${name}, logarithmic` : name, nameLocation: isX ? 'middle' : 'end', nameGap: isX ? 28 : 14,
      nameTextStyle: { align: isX ? 'center' : 'left' }, axisLabel: { formatter: (value) => label(value),
        hideOverlap: true },
      splitLine: { show: !isX, lineStyle: { color: Shell.colour('line'), opacity: 0.5 } } });
  }

  /* An axis with round limits around values, where the description has none. */
  function rounded(described, values) {
    const { log, min, max } = described;
    const found = values.filter((value) => isNumber(value) && !(log && value <= 0));
    if (!found.length || described.interval) return described;
    let [low, high] = [min ?? Math.min(...found), max ?? Math.max(...found)];
    if (log) return { ...described, min: min ?? log ** Math.floor(Math.log(low) / Math.log(log)),
      max: max ?? log ** Math.ceil(Math.log(high) / Math.log(log)) };
    if (!(high > low)) [low, high] = [min ?? low - (Math.abs(low) || 1) / 2, max ?? high + (Math.abs(high) || 1) / 2];
    const rough = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const interval = Math.max([1, 2, 5, 10].find((step) => step * power >= rough) * power, described.whole ? 1 : 0);
    const end = (value, round) => Number((round(value / interval) * interval).toPrecision(12));
    /* Nothing is more than all of it. */
    const most = described.share && high <= 1 ? 1 : Infinity;
    return { ...described, interval, min: min ?? end(low - interval * 0.05, Math.floor),
      max: max ?? Math.min(end(high + interval * 0.05, Math.ceil), most) };
  }

  /* The base of a logarithmic axis, where values are too far apart for a linear one. */
  function logBase(values, ratio = 50) {
    const found = values.filter((value) => value > 0);
    const far = Math.max(...found) / Math.min(...found);
    return found.length && far > ratio ? (far > 300 ? 10 : 2) : undefined;
  }

  const inside = ({ min = -Infinity, max = Infinity }, value) => value >= min && value <= max;

  /* What ECharts draws for { x, y, lines, area, tell }. A line: { name, colour, points, symbol, dash, width, pale,
     hidden (its name), level (a horizontal line), area }. A point: { x, y, low, high, hollow,
       ... }; one beyond the end of
     the axis is an arrow at the end. tell: the text for a point. */
  function options({ x: anyX, y: anyY, lines, marks = [], tell }, width, height) {
    const named = lines.filter(({ hidden, points }) => !hidden && points.length);
    const letters = Math.max(0, ...named.map(({ label, name }) => (label ?? name).length));
    const room = named.length ? Math.min(40 + 7 * letters, 190, width * 0.32) : 20;
    const x = rounded(anyX, lines.flatMap(({ points }) => points.map((point) => point.x)));
    const y = rounded(anyY, [...lines.flatMap(({ points, level }) => [level,
      ...points.flatMap((point) => [point.y, point.low, point.high])]),
      ...marks.map(({ yAxis }) => yAxis)]);
    return {
      grid: { left: 12, right: room, top: 34, bottom: 34, containLabel: true },
      tooltip: Shell.tooltip(({ data }) => (data?.line ? tell(data) : ''), { trigger: 'item' }),
      xAxis: axis(x, true),
      yAxis: axis(y, false),
      dataZoom: ['xAxisIndex', 'yAxisIndex'].map((which) => ({ type: 'inside', [which]: 0, filterMode: 'none',
        zoomOnMouseWheel: 'ctrl', moveOnMouseMove: true, moveOnMouseWheel: false })),
      series: [...lines.map((line, place) => lineSeries(line, y, place ? [] : marks)), beyond(lines, y),
        ends(named, x, y, width, height, room)],
    };
  }

  function lineSeries(line, y, marks) {
    const { name, colour, points, width = 2, pale = false, level, area } = line;
    const bars = points.filter(({ low, high }) => high > low && inside(y, low) && inside(y, high));
    return { type: 'line', name, symbol: line.symbol ?? 'circle', symbolSize: line.size ?? (pale ? 6 : 10),
      showAllSymbol: true, showSymbol: line.size !== 0, symbolKeepAspect: true,
      z: pale ? 3 : 5, triggerLineEvent: true, silent: line.silent,
      data: points.map((point) => ({ ...point, line: name, value: [point.x, point.y],
        symbolSize: point.pinned ? 18 : undefined,
        itemStyle: point.pinned ? { borderColor: Shell.colour('mark'), borderWidth: 3 }
          : point.hollow ? { color: Shell.colour('paper'), borderColor: colour, borderWidth: 2 } : undefined })),
      itemStyle: { color: colour, opacity: 1 }, areaStyle: area ? { color: colour, opacity: 0.35 } : undefined,
        step: area && 'middle',
      lineStyle: { color: colour, width: line.scatter ? 0 : width, type: line.dash ?? 'solid',
        opacity: line.opacity ?? 1 },
      emphasis: { focus: 'series' }, blur: { lineStyle: { opacity: 0.5 * Math.min(line.opacity ?? 1, 0.4) },
        itemStyle: { opacity: 0.2 } },
      markArea: line.band && { silent: true, itemStyle: { color: colour, opacity: 0.15 },
        data: [[{ yAxis: line.band[0] }, { yAxis: line.band[1] }]] },
      markLine: { silent: true, symbol: 'none', precision: 12, label: { show: false }, animation: false,
        lineStyle: { color: colour, width: 1.5, type: 'solid' },
        data: [...bars.map(({ x, low, high }) => [{ coord: [x, low] }, { coord: [x, high] }]),
          ...(level === undefined ? [] : [{ yAxis: level, lineStyle: { width, type: line.dash ?? 'solid' } }]),
          ...marks.map(({ label, ...at }) => ({ ...at, lineStyle: { color: Shell.colour('quiet'), type: 'dashed' },
            label: { show: true, formatter: label, color: Shell.colour('quiet'), position: 'insideStartTop' } }))] } };
  }

  /* Points beyond the axis, as arrows at its end. */
  function beyond(lines, y) {
    return { type: 'scatter', name: 'beyond', symbol: 'triangle', symbolSize: 11, z: 6, clip: false,
      data: lines.flatMap(({ name, colour, points, pale }) => points.filter((point) => !inside(y, point.y))
        .map((point) => ({ ...point,
        line: name, beyond: true, value: [point.x, point.y > y.max ? y.max : y.min],
          symbolRotate: point.y > y.max !== Boolean(y.inverse) ? 0 : 180,
        itemStyle: { color: Shell.colour('paper'), borderColor: colour, borderWidth: pale ? 1.5 : 2.5 } }))) };
  }

  /* A name for each line in a column on the right, by the height of the line's last point, none above another. */
  function ends(lines, x, y, width, height, room) {
    const scale = y.log ? Math.log : (value) => value;
    const back = y.log ? Math.exp : (value) => value;
    const step = ((scale(y.max) - scale(y.min)) * 16) / (height - 110);
    const edge = x.inverse ? x.min : x.max;
    const last = ({ points, level }) => {
      const point = points.filter((each) => inside(y, each.y)).at(-1) ?? { ...points.at(-1), y: y.max };
      return [level === undefined ? point.x : edge, point.y];
    };
    const places = lines.map((line) => ({ line, from: last(line), at: scale(last(line)[1]) }))
      .sort((a, b) => b.at - a.at);
    places.forEach((each, row) => { each.at = Math.min(each.at, row ? places[row - 1].at - step : Infinity); });
    /* From below upwards again, where the last ones lie under the axis. */
    places.toReversed().forEach((each, row, all) => { each.at = Math.max(each.at,
      row ? all[row - 1].at + step : scale(y.min)); });
    return { type: 'scatter', name: 'names', silent: true, symbolSize: 0.01, z: 7, clip: false,
      data: places.map(({ line, at }) => ({ value: [edge, back(at)],
        label: { color: line.pale ? Shell.colour('quiet') : line.colour,
        formatter: clip(line.label ?? line.name, Math.floor((room - 18) / 7.2)),
          fontWeight: line.pale ? 'normal' : 'bold' } })),
      label: { show: true, position: 'right', fontSize: 12 }, blur: { label: { opacity: 1 } },
        labelLayout: { x: width - room + 16, align: 'left' },
      markLine: { silent: true, symbol: 'none', precision: 12, label: { show: false },
        lineStyle: { type: 'solid', width: 1, opacity: 0.35 },
        data: places.map(({ line, from, at }) => [{ coord: from, lineStyle: { color: line.colour } },
          { coord: [edge, back(at)] }]) } };
  }

  /* A picture of lines. describe: makes the description for a width, null where nothing is shown. */
  function linePicture({ label, caption = '', describe, height = () => 380, onPick = null }) {
    const picture = new Shell.Picture({ label, caption, height, onPick,
      options: (width) => options(describe(width), width, height(width)),
      rows: () => {
        const { x, y, lines } = describe(1000);
        return [label, [{ words: 'line' }, x.name, y.name, 'from', 'to'],
          lines.filter(({ silent }) => !silent).flatMap((line) => line.points.map((point) =>
          [{ words: point.title ?? line.name }, (x.label ?? form(x))(point.x), form(y)(point.y),
            ...[point.low, point.high].map(form(y))]))];
      } });
    return picture;
  }

  /* A row for each item { name, x, low, high, colour, symbol, ... }, the first on top. */
  function dotPicture({ label, caption, describe, onPick = null }) {
    return new Shell.Picture({ label, caption, onPick, height: () => 80 + 24 * describe().items.length,
      options: (width) => {
        const { x, items, tell, marks = [] } = describe();
        const left = Math.min(width * 0.5, 290);
        return { grid: { left, right: 24, top: 10, bottom: 44 },
          tooltip: Shell.tooltip(({ data }) => (data?.name ? tell(data) : '')),
            xAxis: { ...axis(rounded(x, [0, ...items.flatMap((item) => [item.x, item.low, item.high])]), true),
            splitLine: { show: true, lineStyle: { color: Shell.colour('line'), opacity: 0.5 } } },
          yAxis: Shell.axis({ type: 'category', inverse: true, data: items.map(({ name }) => name),
            axisTick: { show: false },
            axisLabel: { color: Shell.colour('ink'), width: left - 16, overflow: 'truncate', interval: 0 } }),
          series: [{ type: 'scatter', name: label, symbolSize: 11,
            data: items.map((item, row) => ({ ...item, value: [item.x, row],
            symbolSize: item.pinned ? 18 : undefined, itemStyle: { color: item.colour,
              borderColor: item.pinned ? Shell.colour('mark') : undefined, borderWidth: item.pinned ? 3 : 0 } })),
            markLine: { silent: true, symbol: 'none', precision: 12, label: { show: false },
              lineStyle: { type: 'solid', width: 2 },
              data: [...items.map(({ low, high, colour }, row) =>
                (high > low ? [{ coord: [low, row], lineStyle: { color: colour } },
                { coord: [high, row] }] : null)).filter(Boolean), ...marks.map((at) => ({ ...at,
                  lineStyle: { type: 'dashed', color: Shell.colour('quiet'), width: 1.5 } }))] } }] };
      },
      rows: () => {
        const { x, items } = describe();
        return [label, [{ words: 'name' }, x.name, 'from', 'to'], items.map(({ name, ...item }) => [{ words: name },
          ...[item.x, item.low, item.high].map(form(x))])];
      } });
  }

  return { isNumber, short, clip, share, symbol, dash, shade, colourOf, logBase, linePicture, dotPicture };
})();
