'use strict';
/* Timings of lte bench: latency against sparsity with the limit that bytes set, and what batches do to sparsity. */

class LatencyPlot {
  constructor(benches) {
    // The one with most sparsities first.
    const sparsities = ({ rows }) => new Set(rows.map(({ sparsity }) => sparsity)).size;
    const groups = benches.flatMap(({ latency }) => latency).filter(({ rows }) => rows.length)
      .sort((a, b) => sparsities(b) - sparsities(a));
    this.isEmpty = !groups.length;
    if (this.isEmpty) return;
    [this.group] = groups;
    this.switches = new Switches('Implementations');
    const choice = choiceOf('Measurement', groups.map((group) => [group.title, group]), (group) => {
      this.group = group;
      this.start();
      this.picture.draw();
    });
    this.picture = new Shell.Picture({
      label: 'Measured latency against FFN sparsity, with the time that reading the weights takes',
      caption: 'Each symbol is a median time, with a bar from the 20th to the 80th percentile: a curve that falls ' +
        'to the right turns skipped neurons into saved time, and the dashed line is how long just reading the ' +
        'needed weights takes at the speed at which this machine copies memory, which a model that fits a cache ' +
        'can beat. Implementations whose name begins with “dense” skip nothing and are horizontal lines.',
      options: () => this.options(),
      rows: () => this.rows(),
      height: (width) => (width < 500 ? 360 : 440),
    });
    this.box = Shell.element('div', { class: 'panel' }, Shell.element('div', { class: 'controls' }, choice.box),
      this.switches.box, this.picture.box);
    this.start();
  }

  start() {
    const names = [...new Set(this.group.rows.map(({ provider }) => provider))];
    this.switches.fill(names.map((name) => ({ name, look: Looks.of(name) })));
    this.switches.onChange(() => this.picture.draw());
  }

  shown() {
    return this.group.rows.filter(({ provider, median_ms: median }) => this.switches.isOn(provider)
      && Draw.isNumber(median));
  }

  /* The bytes of one sparse implementation, the last of ours: others read as many, or more. */
  limit() {
    const sparse = this.group.rows.filter(({ is_dense: dense, bandwidth_ms: time }) => !dense && Draw.isNumber(time));
    const ours = sparse.filter(({ provider }) => provider.startsWith('lte'));
    const name = (ours.length ? ours : sparse).at(-1)?.provider;
    return sparse.filter(({ provider }) => provider === name).map(({ sparsity, bandwidth_ms: time }) =>
      [sparsity, time]).sort((a, b) => a[0] - b[0]);
  }

  text({ row }) {
    const setting = row.is_dense ? 'dense'
      : `${Shell.percent(row.sparsity)} sparsity${(row.setting || '').startsWith('own') ? ', own routing' : ''}`;
    return [row.provider, setting,
      `${Draw.short(row.median_ms)} ms (${Draw.short(row.p20_ms)} to ${Draw.short(row.p80_ms)})`,
      `bytes alone: ${Draw.short(row.bandwidth_ms)} ms`].join('\n');
  }

  options() {
    const shown = this.shown();
    if (!shown.length) return Draw.nothing('All implementations are switched off');
    const limit = this.limit();
    const times = [...shown.flatMap((row) => [row.median_ms, row.p20_ms, row.p80_ms]),
      ...limit.map(([, time]) => time)];
    const far = Math.max(...shown.map((row) => row.median_ms)) > 8 * Math.min(...shown.map((row) => row.median_ms));
    const providers = [...Map.groupBy(shown, ({ provider }) => provider)];
    return {
      grid: { left: 14, right: 24, top: 34, bottom: 46, containLabel: true },
      tooltip: Shell.tooltip(({ data }) => (data?.row ? this.text(data) : data?.limit ?? '')),
      xAxis: Draw.shareAxis('FFN sparsity', Draw.below('FFN sparsity')),
      yAxis: Draw.valueAxis(`latency in ms${far ? ', logarithmic' : ''}`, times, { ratio: far ? 1 : Infinity,
        fromZero: true }),
      series: [...providers.map(([name, rows]) => this.providerSeries(name, rows)), this.bars(shown),
        { type: 'line', name: 'bytes alone', symbol: 'none', lineStyle: { color: Shell.colour('ink'), type: 'dashed',
          width: 1.5 },
          data: limit.map((value) => ({ value, limit: 'time for the bytes alone' })) }],
    };
  }

  providerSeries(name, rows) {
    const look = Looks.of(name);
    const dense = rows.every((row) => row.is_dense);
    const data = rows.map((row) => ({ row, value: [row.sparsity, row.median_ms] }))
      .sort((a, b) => a.value[0] - b.value[0]);
    return { type: 'line', name, data, ...Looks.symbol(look), showAllSymbol: true, lineStyle: { color: look.colour,
      type: look.dash, width: 2 },
      markLine: dense ? Draw.lines(data.map(({ value }) => value[1]), { color: look.colour, type: look.dash, width: 2 })
        : undefined };
  }

  bars(shown) {
    const known = shown.filter((row) => Draw.isNumber(row.p20_ms) && Draw.isNumber(row.p80_ms));
    return Draw.errorBars(known.map((row) => [row.sparsity, row.median_ms, row.sparsity, row.sparsity, row.p20_ms,
      row.p80_ms]),
      known.map((row) => Looks.of(row.provider).colour));
  }

  rows() {
    return [this.group.title, [{ words: 'implementation' }, 'FFN sparsity', 'median ms', '20th percentile',
      '80th percentile', 'bytes alone, ms', 'GB/s'],
      this.shown().map((row) => [{ words: row.provider + ((row.setting || '').startsWith('own') ? ', own routing' : '') }, row.is_dense
        ? 'dense' : Shell.percent(row.sparsity),
        ...[row.median_ms, row.p20_ms, row.p80_ms, row.bandwidth_ms, row.gb_per_s].map(Draw.short)])];
  }
}

class BatchPlots {
  constructor(benches) {
    // Those that fill both pictures first.
    const filled = ({ break_even: ratios, union }) => Math.sign(ratios.length) + Math.sign(union.length);
    const found = benches.filter(filled).sort((a, b) => filled(b) - filled(a));
    this.isEmpty = !found.length;
    if (this.isEmpty) return;
    const { element } = Shell;
    const choice = choiceOf('Measurement', found.map((bench) => [bench.name, bench]), (bench) => this.show(bench));
    this.pictures = [this.unionPicture(), this.ratioPicture()];
    this.boxes = this.pictures.map((picture, place) => element('div', { class: 'panel' },
      element('h3', {}, ['Union sparsity', 'Break-even batch'][place]), picture.box));
    this.sentence = element('div', {});
    this.boxes[1].insertBefore(this.sentence, this.pictures[1].box);
    this.absent = element('p', { class: 'quiet' },
      'This file has no union sparsity: lte bench measures it on a sparse model with texts of its own.');
    this.box = element('div', {}, element('div', { class: 'controls' }, choice.box), this.absent,
      element('div', { class: 'columns two' }, ...this.boxes));
    this.show(found[0]);
  }

  show(bench) {
    this.bench = bench;
    this.boxes[0].hidden = !bench.union.length;
    this.absent.hidden = bench.union.length > 0;
    this.boxes[1].hidden = !bench.break_even.length;
    this.sentence.replaceChildren(...bench.break_even.map((row) => Shell.element('p', {}, this.say(row))));
    this.pictures.forEach((picture) => picture.draw());
  }

  setting({ benchmark, setting }) {
    const [, own, share] = setting.match(/^(own)?@?(.*)$/);
    const percent = share && `${Draw.short(100 * Number(share))}%`;
    return `${benchmark}, ${own ? `own routing${share && ` at ${percent}`}` : `${percent} sparsity`}`;
  }

  say(row) {
    const found = row.break_even === null
      ? `faster than dense up to batch ${row.batches.at(-1)}, the largest that was measured`
      : `no longer faster than dense from batch ${row.break_even}`;
    return `${this.setting(row)}: ${found}.`;
  }

  /* How many rows of a legend at most this many entries take; in a single column they stand below each other. */
  legendRows(width, entries) {
    const columns = Math.max(Math.floor(width / 160), 1);
    return { orient: columns > 1 ? 'horizontal' : 'vertical', room: 24 * Math.ceil(entries / columns) };
  }

  lines(series, yAxis, text, width) {
    const { orient, room } = this.legendRows(width, series.length);
    const batches = [...new Set(series.flatMap(({ data }) => data.map(([batch]) => batch)))].sort((a, b) => a - b);
    return {
      legend: { top: 0, left: 0, orient, selectedMode: false, textStyle: { color: Shell.colour('ink') } },
      grid: { left: 14, right: 24, top: 40 + room, bottom: 46, containLabel: true },
      tooltip: Shell.tooltip(({ seriesName, value }) => `${seriesName}\nbatch ${batches[value[0]]}: ${text(value[1])}`),
      xAxis: Shell.axis({ type: 'category', data: batches.map(String),
        ...Draw.below('batch: texts decoded together') }),
      yAxis,
      series: series.map((each, place) => {
        const look = Looks.setting(place, series.length);
        return { type: 'line', ...Looks.symbol(look), lineStyle: { color: look.colour, width: 2, type: each.dash
          ?? 'solid' }, ...each,
          data: each.data.map(([batch, value]) => [batches.indexOf(batch), value]) };
      }),
    };
  }

  unionPicture() {
    const form = (value) => (Draw.isNumber(value) ? Shell.percent(1 - value) : '-');
    return new Shell.Picture({
      label: 'Union sparsity by batch size',
      caption: 'Weights that at least one text of a batch needs must be read, so the share that all can skip falls ' +
        'as the batch grows; the second line is what it would be if texts chose independently of each other.',
      options: (width) => this.lines([
        { name: 'measured', data: this.bench.union.map((row) => [row.batch, 1 - row.union]) },
        { name: 'if independent', dash: 'dashed', data: this.bench.union.filter((row) => Draw.isNumber(row.independent))
          .map((row) => [row.batch, 1 - row.independent]) },
      ], Draw.shareAxis('share skipped by all'), Shell.percent, width),
      rows: () => ['Union sparsity by batch', ['batch', 'skipped by all', 'if independent'],
        this.bench.union.map((row) => [row.batch, form(row.union), form(row.independent)])],
      height: (width) => 336 + this.legendRows(width, 2).room,
    });
  }

  ratioPicture() {
    return new Shell.Picture({
      label: 'Latency over that of the fastest dense implementation, by batch size',
      caption: 'Below the dashed line at 1 the sparse model is faster than the dense one; where its line crosses ' +
        'is the batch from which skipping no longer pays.',
      options: (width) => {
        const rows = this.bench.break_even;
        const ratios = rows.flatMap((row) => row.ratios);
        const options = this.lines(rows.map((row) =>
          ({ name: this.setting(row), data: row.batches.map((batch, place) => [batch, row.ratios[place]]) })),
          Draw.valueAxis('latency over dense', [...ratios, 1.1], { fromZero: true }), Draw.short, width);
        options.series[0].markLine = Draw.lines([1], { color: Shell.colour('ink'), type: 'dashed', width: 1.5 });
        return options;
      },
      rows: () => ['Latency over the fastest dense', [{ words: 'setting' }, 'batch', 'latency over dense',
        'break-even batch'],
        this.bench.break_even.flatMap((row) => row.batches.map((batch, place) => [{ words: this.setting(row) }, batch,
          Draw.short(row.ratios[place]),
          row.break_even ?? 'none measured']))],
      height: (width) => 336 + this.legendRows(width, this.bench.break_even.length).room,
    });
  }
}
