//! Which figures there are, and which results belong in each.

use std::collections::BTreeSet;

use super::unit::{Unit, grouped, ratio};
use crate::results::{Report, Series};
use crate::subjects::Kind;

/// The parameter of loads with a given rate. Loads without it are as fast as possible.
const RATE: &str = "rate";

/// One picture, and one table of the page. For each row (a load) and each panel (a metric), it has
/// a value of each subject.
#[derive(Debug)]
pub(super) struct Figure {
    /// The name of the picture's file, and of the place on the page.
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) workload: &'static str,
    pub(super) rows: Vec<String>,
    pub(super) panels: Vec<Panel>,
    /// Whether the bars of one row have the same scale in all panels, because the panels are parts
    /// of a whole.
    pub(super) one_scale: bool,
}

#[derive(Debug)]
pub(super) struct Panel {
    pub(super) title: &'static str,
    pub(super) unit: Unit,
    /// By row: the subjects that were measured.
    pub(super) cells: Vec<Vec<Cell>>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cell {
    pub(super) subject: Kind,
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Figure {
    /// The subjects that have a value in this figure, in order.
    pub(super) fn subjects(&self) -> Vec<Kind> {
        let has = |kind: &Kind| {
            let mut cells = self.panels.iter().flat_map(|panel| &panel.cells).flatten();
            cells.any(|cell| cell.subject == *kind)
        };
        Kind::ALL.into_iter().filter(has).collect()
    }
}

impl Panel {
    pub(super) fn cell(&self, row: usize, subject: Kind) -> Option<&Cell> {
        self.cells[row].iter().find(|cell| cell.subject == subject)
    }

    /// The ratio of a cell to the direct connection's cell. `None` for the direct connection
    /// itself, or if it was not measured.
    pub(super) fn to_direct(&self, row: usize, cell: &Cell) -> Option<String> {
        let direct = self.cell(row, Kind::Direct).filter(|_| cell.subject != Kind::Direct)?;
        ratio(cell.median, direct.median)
    }
}

/// Which results a figure shows.
struct Draft {
    name: &'static str,
    title: &'static str,
    workload: &'static str,
    /// The parameters whose values distinguish the rows.
    rows: &'static [&'static str],
    /// What one of the `connections` is called in this figure.
    connection: &'static str,
    panels: &'static [PanelDraft],
    one_scale: bool,
}

/// Title, unit, metric, and the parameters that are the same in all rows.
type PanelDraft = (&'static str, Unit, &'static str, &'static [(&'static str, &'static str)]);

const DRAFTS: [Draft; 10] = [
    Draft {
        name: "echo-rate",
        title: "Echo: messages per second",
        workload: "echo",
        rows: &["connections"],
        connection: "WebSocket",
        panels: &[
            ("64 B", Unit::Count, "messages_per_s", &[("bytes", "64")]),
            ("512 B", Unit::Count, "messages_per_s", &[("bytes", "512")]),
            ("4 KiB", Unit::Count, "messages_per_s", &[("bytes", "4096")]),
        ],
        one_scale: false,
    },
    Draft {
        name: "echo-latency",
        title: "Echo of 64 B: time from a message to its echo",
        workload: "echo",
        rows: &["connections"],
        connection: "WebSocket",
        panels: &[
            ("p50", Unit::Microseconds, "p50_us", &[("bytes", "64")]),
            ("p99", Unit::Microseconds, "p99_us", &[("bytes", "64")]),
            ("p99.9", Unit::Microseconds, "p999_us", &[("bytes", "64")]),
        ],
        one_scale: false,
    },
    Draft {
        name: "bulk",
        title: "Bulk: payload in Gbit/s",
        workload: "bulk",
        rows: &["connections"],
        connection: "stream",
        panels: &[
            ("upload", Unit::Gbit, "gbit_per_s", &[("direction", "upload")]),
            ("download", Unit::Gbit, "gbit_per_s", &[("direction", "download")]),
            ("both", Unit::Gbit, "gbit_per_s", &[("direction", "both")]),
        ],
        one_scale: false,
    },
    Draft {
        name: "fan-out",
        title: "Fan-out: the endpoint pushes to a few of many WebSockets",
        workload: "fan_out",
        rows: &["connections"],
        connection: "WebSocket",
        panels: &[
            ("messages/s", Unit::Count, "messages_per_s", &[]),
            ("p50", Unit::Microseconds, "p50_us", &[]),
            ("p99", Unit::Microseconds, "p99_us", &[]),
        ],
        one_scale: false,
    },
    Draft {
        name: "cpu",
        title: "Echo of 64 B: CPU time",
        workload: "echo",
        rows: &["connections", "rate"],
        connection: "WebSocket",
        panels: &[
            ("machine, per 100k messages", Unit::Milliseconds, "cpu_ms_per_100k", &[("bytes", "64")]),
            ("of it over direct", Unit::Milliseconds, "proxy_cpu_ms_per_100k", &[("bytes", "64")]),
            ("proxy process, per second", Unit::Milliseconds, "process_cpu_ms", &[("bytes", "64")]),
        ],
        one_scale: false,
    },
    Draft {
        name: "upgrades",
        title: "Upgrades: connect, upgrade, one echo, close",
        workload: "upgrades",
        rows: &["connections"],
        connection: "connection",
        panels: &[
            ("upgrades/s", Unit::Count, "upgrades_per_s", &[]),
            ("p50", Unit::Microseconds, "p50_us", &[]),
            ("p99", Unit::Microseconds, "p99_us", &[]),
            ("101 to kernel splice", Unit::Microseconds, "splice_us", &[]),
        ],
        one_scale: false,
    },
    Draft {
        name: "polling",
        title: "Polling: requests on connections that are kept",
        workload: "polling",
        rows: &["method", "bytes"],
        connection: "connection",
        panels: &[
            ("requests/s", Unit::Count, "requests_per_s", &[]),
            ("p50", Unit::Microseconds, "p50_us", &[]),
            ("p99", Unit::Microseconds, "p99_us", &[]),
        ],
        one_scale: false,
    },
    Draft {
        name: "memory",
        title: "Memory of the proxy for each idle WebSocket",
        workload: "memory",
        rows: &["connections"],
        connection: "WebSocket",
        panels: &[
            ("all", Unit::Bytes, "bytes_per_stream", &[]),
            ("process", Unit::Bytes, "process_bytes_per_stream", &[]),
            ("BPF maps", Unit::Bytes, "map_bytes_per_stream", &[]),
            ("kernel", Unit::Bytes, "kernel_bytes_per_stream", &[]),
            ("each further one", Unit::Bytes, "further_stream_bytes", &[]),
        ],
        one_scale: true,
    },
    Draft {
        name: "capacity",
        title: "WebSockets with 20,000 descriptors, and the proxy at rest",
        workload: "memory",
        rows: &["connections"],
        connection: "WebSocket",
        panels: &[
            ("WebSockets held", Unit::Count, "streams", &[("connections", "most")]),
            ("sockets for each", Unit::Count, "sockets_per_stream", &[("connections", "most")]),
            ("process at rest", Unit::Bytes, "idle_process_bytes", &[("connections", "most")]),
            ("BPF maps at rest", Unit::Bytes, "idle_map_bytes", &[("connections", "most")]),
        ],
        one_scale: false,
    },
    Draft {
        name: "programs",
        title: "BPF programs of the packet splice under load",
        workload: "programs",
        rows: &["program", "load"],
        connection: "WebSocket",
        panels: &[
            ("per packet", Unit::Nanoseconds, "ns_per_packet", &[]),
            ("packets/s", Unit::Count, "packets_per_s", &[]),
        ],
        one_scale: false,
    },
];

/// The names of all possible figures.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    DRAFTS.iter().map(|draft| draft.name)
}

/// The figures for which the report has values.
pub(super) fn of(report: &Report) -> Vec<Figure> {
    DRAFTS.iter().filter_map(|draft| draft.fill(report)).collect()
}

impl Draft {
    fn fill(&self, report: &Report) -> Option<Figure> {
        let of_workload = report.results.iter().filter(|series| series.workload == self.workload);
        let shown: Vec<_> = of_workload
            .filter_map(|series| Some((self.panel_of(series)?, self.row_of(series)?, series)))
            .collect();
        let rows: BTreeSet<&Vec<Param>> = shown.iter().map(|(_, row, _)| row).collect();
        let cell = |panel: usize, row: &Vec<Param>, subject: Kind| {
            let is_it = |it: &&(usize, Vec<Param>, &Series)| {
                it.0 == panel && it.1 == *row && it.2.subject == subject.name()
            };
            let (.., series) = shown.iter().find(is_it)?;
            Some(Cell { subject, median: series.median, min: series.min, max: series.max })
        };
        let panel = |(index, &(title, unit, ..)): (usize, &PanelDraft)| {
            let subjects = |row| Kind::ALL.into_iter().filter_map(|kind| cell(index, row, kind)).collect();
            Panel { title, unit, cells: rows.iter().map(|row| subjects(row)).collect() }
        };
        let mut panels: Vec<Panel> = self.panels.iter().enumerate().map(panel).collect();
        panels.retain(|panel| panel.cells.iter().any(|cells| !cells.is_empty()));
        let label = |row: &&Vec<Param>| {
            let labels = self.rows.iter().zip(*row).map(|(name, param)| param.label(name, self.connection));
            labels.filter(|label| !label.is_empty()).collect::<Vec<_>>().join(", ")
        };
        let &Draft { name, title, workload, one_scale, .. } = self;
        let figure =
            Figure { name, title, workload, rows: rows.iter().map(label).collect(), panels, one_scale };
        (!figure.panels.is_empty()).then_some(figure)
    }

    /// The index of the panel that shows this series.
    fn panel_of(&self, series: &Series) -> Option<usize> {
        self.panels.iter().position(|(_, _, metric, params)| {
            let has =
                |(name, text): &(&str, &str)| Param::of(series, name).is_some_and(|it| it.text == *text);
            series.metric == *metric && params.iter().all(has)
        })
    }

    /// The values of the row's parameters. A load at a given rate and a load at full speed are
    /// different rows.
    fn row_of(&self, series: &Series) -> Option<Vec<Param>> {
        let paced = Param::of(series, RATE).is_some();
        let value = |name: &&str| Param::of(series, name).or_else(|| (*name == RATE).then(Param::default));
        (!paced || self.rows.contains(&RATE)).then(|| self.rows.iter().map(value).collect()).flatten()
    }
}

/// The value of a parameter. Numbers are ordered before texts.
#[derive(Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Param {
    number: u64,
    text: String,
}

impl Param {
    fn of(series: &Series, name: &str) -> Option<Self> {
        let value = series.params.get(name)?;
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        Some(Self { number: value.as_u64().unwrap_or(u64::MAX), text })
    }

    /// The words for the parameter `name` at the start of a row.
    fn label(&self, name: &str, connection: &str) -> String {
        match name {
            _ if self.number == u64::MAX => self.text.clone(),
            "connections" if self.number == 1 => format!("1 {connection}"),
            "connections" => format!("{} {connection}s", grouped(self.number)),
            // A load at full speed.
            RATE if self.text.is_empty() => String::new(),
            RATE => format!("{}/s", grouped(self.number)),
            "bytes" if self.number >= 1024 => format!("{} KiB", self.number / 1024),
            "bytes" => format!("{} B", self.number),
            _ => format!("{name} {}", self.text),
        }
    }
}
