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
  const look = (place) => ({ symbol: SYMBOLS[place % SYMBOLS.length], dash: DASHES[place % DASHES.length] });
  /* A method's or an implementation's colour. */
  const colourOf = (name) => Shell.colour(Shell.data.colours[name] ?? 'quiet');

  /* An axis: { name, share, log, inverse, min, max, interval, whole, label }, or { names } of rows from the top. */
  function axis({ name, log, min, max, interval, inverse, whole, names, ...rest }, isX, width) {
    if (names) {
      return Shell.axis({ type: 'category', inverse: true, data: names, axisTick: { show: false },
        axisLabel: { color: Shell.colour('ink'), interval: 0, overflow: 'truncate', width: Math.min(width / 2, 290) },
      });
    }
    const label = rest.label ?? form(rest);
    return Shell.axis({ type: log ? 'log' : 'value', logBase: log, inverse, min, max, interval, scale: true,
      minInterval: whole ? 1 : undefined, name: log ? `${name}, logarithmic` : name,
      nameLocation: isX ? 'middle' : 'end', nameGap: isX ? 28 : 14,
      nameTextStyle: { align: isX ? 'center' : 'left' },
      axisLabel: { formatter: (value) => label(value), hideOverlap: true },
      splitLine: { show: !isX, lineStyle: { color: Shell.colour('line'), opacity: 0.5 } } });
  }

  const inside = ({ min = -Infinity, max = Infinity }, value) => value >= min && value <= max;

  /* What ECharts draws for { x, y, lines, marks, tell }. A line: { name, colour, points, symbol, dash, width, pale,
     hidden (its name), level (a horizontal line), area, scatter (points alone) }. A point: { x, y, low, high, hollow,
     ... }; one beyond the end of the axis is an arrow at the end. Where y has names, low and high are of x. tell: the
     text for a point. */
  function options({ x, y, lines, marks = [], tell }, width) {
    const named = lines.filter(({ hidden, points }) => !hidden && points.length);
    const letters = Math.max(0, ...named.map(({ label, name }) => (label ?? name).length));
    const room = named.length ? Math.min(46 + 7 * letters, 196, width * 0.32) : 20;
    const bars = lines.flatMap(({ points, level }) => [[undefined, level], ...points.flatMap((point) =>
      [point.low, point.high].map((end) => (y.names ? [end, point.y] : [point.x, end])))]);
    return {
      grid: { left: 12, right: room, top: 34, bottom: 34, containLabel: true },
      tooltip: Shell.tooltip(({ data }) => (data?.line ? tell(data) : ''), { trigger: 'item' }),
      xAxis: axis(x, true),
      yAxis: axis(y, false, width),
      dataZoom: ['xAxisIndex', 'yAxisIndex'].map((which) => ({ type: 'inside', [which]: 0, filterMode: 'none',
        zoomOnMouseWheel: 'ctrl', moveOnMouseMove: true, moveOnMouseWheel: false })),
      series: [...lines.map((line, place) => lineSeries(line, y, place ? [] : marks)), beyond(lines, y),
        ends(named, x, y, width, room),
        /* Unseen: what the axes reach as well as the points. */
        { type: 'scatter', name: 'reach', silent: true, symbolSize: 0,
          data: [...bars, ...marks.map(({ xAxis, yAxis }) => [xAxis, yAxis])] }],
    };
  }

  function lineSeries(line, y, marks) {
    const { name, colour, points, width = 2, pale = false, level, area, opacity = 1, dash: type = 'solid' } = line;
    const bars = points.filter(({ low, high }) => high > low && inside(y, low) && inside(y, high));
    const end = (point, value) => ({ coord: y.names ? [value, point.y] : [point.x, value] });
    const style = (point) => (point.pinned ? { borderColor: Shell.colour('mark'), borderWidth: 3 }
      : point.hollow ? { color: Shell.colour('paper'), borderColor: colour, borderWidth: 2 } : {});
    const quiet = Shell.colour('quiet');
    return { type: line.scatter ? 'scatter' : 'line', name, symbol: line.symbol ?? 'circle',
      symbolSize: line.size ?? (pale ? 6 : 10), showAllSymbol: true, showSymbol: line.size !== 0,
      symbolKeepAspect: true, z: pale ? 3 : 5,
      triggerLineEvent: true, silent: line.silent, step: area && 'middle',
      data: points.map((point) => ({ ...point, line: name, value: [point.x, point.y],
        symbolSize: point.pinned ? 18 : point.size,
        itemStyle: { color: point.colour, opacity: point.opacity, ...style(point) } })),
      itemStyle: { color: colour, opacity: line.scatter ? opacity : 1 },
      areaStyle: area ? { color: colour, opacity: 0.35 } : undefined,
      lineStyle: { color: colour, width, type, opacity },
      emphasis: line.scatter ? { scale: 1.8, itemStyle: { color: Shell.colour('mark'), opacity: 1 } }
        : { focus: 'series' },
      blur: { lineStyle: { opacity: 0.5 * Math.min(opacity, 0.4) }, itemStyle: { opacity: 0.2 } },
      markArea: line.band && { silent: true, itemStyle: { color: colour, opacity: 0.15 },
        data: [line.band.map((yAxis) => ({ yAxis }))] },
      markLine: { silent: true, symbol: 'none', precision: 12, label: { show: false }, animation: false,
        lineStyle: { color: colour, width: 1.5, type: 'solid' },
        data: [...bars.map((point) => [{ ...end(point, point.low), lineStyle: { color: point.colour ?? colour } },
          end(point, point.high)]),
        ...(level === undefined ? [] : [{ yAxis: level, lineStyle: { width, type } }]),
        ...marks.map(({ label, ...at }) => ({ ...at, lineStyle: { color: quiet, type: 'dashed' },
          label: { show: Boolean(label), formatter: label, color: quiet, position: 'insideStartTop' } }))] } };
  }

  /* Points beyond the axis, as arrows at its end. */
  function beyond(lines, y) {
    return { type: 'scatter', name: 'beyond', symbol: 'triangle', symbolSize: 11, z: 6, clip: false,
      data: lines.flatMap(({ name, colour, points, pale }) => points.filter((point) => !inside(y, point.y))
        .map((point) => ({ ...point, line: name, beyond: true, value: [point.x, point.y > y.max ? y.max : y.min],
          symbolRotate: point.y > y.max !== Boolean(y.inverse) ? 0 : 180,
          itemStyle: { color: Shell.colour('paper'), borderColor: point.pinned ? Shell.colour('mark') : colour,
            borderWidth: pale ? 1.5 : 2.5 } }))) };
  }

  /* A name for each line in a column on the right, near the height of the line's last point, none above another. */
  function ends(lines, x, y, width, room) {
    const last = ({ points, level }) => {
      const point = points.filter((each) => inside(y, each.y)).at(-1) ?? { ...points.at(-1), y: y.max };
      return [level === undefined ? point.x : x.inverse ? x.min : x.max, point.y];
    };
    return { type: 'scatter', name: 'names', silent: true, symbolSize: 0.01, z: 7, clip: false,
      data: lines.map((line) => ({ value: last(line), labelLine: { lineStyle: { color: line.colour } },
        label: { color: line.pale ? Shell.colour('quiet') : line.colour, fontWeight: line.pale ? 'normal' : 'bold',
          formatter: clip(line.label ?? line.name, Math.floor((room - 24) / 7.2)) } })),
      label: { show: true, position: 'right', fontSize: 12, lineHeight: 16 }, blur: { label: { opacity: 1 } },
      labelLayout: { x: width - room + 22, align: 'left', moveOverlap: 'shiftY' },
      labelLine: { show: true, length2: 5, lineStyle: { width: 1, opacity: 0.35 } } };
  }

  /* A picture of lines. describe: makes the description for a width; the others are as of `Shell.Picture`. */
  function linePicture({ label, describe, ...others }) {
    return new Shell.Picture({ label, caption: '', height: () => 380,
      options: (width) => options(describe(width), width), rows: () => {
        const { x, y, lines } = describe(1000);
        const places = (y.names ? [x] : [x, y]).map(({ name }) => name);
        const row = (line, point) => [{ words: point.name ?? point.title ?? line.name },
          (x.label ?? form(x))(point.x), ...(y.names ? [] : [form(y)(point.y)]),
          ...[point.low, point.high].map(form(y.names ? x : y))];
        return [label, [{ words: 'line' }, ...places, 'from', 'to'],
          lines.filter(({ silent }) => !silent).flatMap((line) => line.points.map((point) => row(line, point)))];
      }, ...others });
  }

  return { isNumber, short, clip, share, look, colourOf, linePicture };
})();
