//! What a guest has to find on a kernel, and which findings go into the table of docs/kernels.md.

use serde_json::{Value, json};
use steer_tests::kernels::{BULK_BYTES, BULK_STREAMS, Has, Kernel, MORE, STREAMS};

/// Steer's log line at the start on kernels where it has to relay.
const RELAYS: &str = "no packet splice, streams are relayed";

/// The findings of one guest.
#[derive(Debug)]
pub(crate) struct Found<'f> {
    kernel: Kernel,
    findings: &'f [Value],
}

impl<'f> Found<'f> {
    pub(crate) fn new(kernel: Kernel, findings: &'f [Value]) -> Self {
        Self { kernel, findings }
    }

    /// The finding `kind` of a phase. Null if there is none.
    fn of(&self, phase: &str, kind: &str) -> &Value {
        let found =
            self.findings.iter().find(|finding| finding["phase"] == phase && finding["finding"] == kind);
        found.unwrap_or(&Value::Null)
    }

    fn alone(&self, kind: &str) -> &Value {
        let found = self.findings.iter().find(|finding| finding["finding"] == kind);
        found.unwrap_or(&Value::Null)
    }

    fn release(&self) -> &str {
        self.alone("kernel")["release"].as_str().unwrap_or_default()
    }

    /// The first two numbers of the release.
    fn series(&self) -> String {
        self.release().split('.').take(2).collect::<Vec<_>>().join(".")
    }

    /// Faults that do not belong to one phase.
    pub(crate) fn check(&self) -> Vec<String> {
        let mut wrong = Wrong::default();
        wrong.unless("an error", self.alone("error"), self.alone("error").is_null());
        let series = self.kernel.series.is_none_or(|series| series == self.series());
        wrong.unless("the kernel", &json!(self.release()), series);
        wrong.equals("the kernel's log", &self.alone("log")["complaints"], &json!([]));
        wrong.0
    }

    /// Faults of streams that were opened, used and closed.
    pub(crate) fn check_carried(&self, phase: &str) -> Vec<String> {
        let mut wrong = Wrong::default();
        let sockmap = phase == "sockmap";
        let path = match self.kernel.has {
            _ if sockmap => "sockmap",
            Has::Tcx | Has::Clsact => "packet",
            Has::Relay => "relay (kernel_refused)",
        };
        let opened = self.of(phase, "opened");
        wrong.equals("streams that opened", &opened["streams"], &json!(STREAMS));
        wrong.equals("what carries them", &opened["carried"], &json!({ path: STREAMS }));
        let count = |kind: &str| opened["objects"][kind].as_u64().unwrap_or_default();
        let objects = match self.kernel.has {
            _ if sockmap => count("programs") > 0 && count("maps") > 0,
            Has::Tcx => count("links") > 0 && count("filters") == 0,
            Has::Clsact => count("filters") > 0,
            Has::Relay => count("links") == 0 && count("filters") == 0,
        };
        wrong.unless("what they are carried by", &opened["objects"], objects);
        let warnings = self.of(phase, "start")["warnings"].as_array().cloned().unwrap_or_default();
        let says = warnings.iter().filter_map(Value::as_str).any(|line| line.contains(RELAYS));
        let relays = !sockmap && self.kernel.has == Has::Relay;
        wrong.unless("the warning that streams are relayed", &json!(warnings), says == relays);
        wrong.equals("streams that echoed", &self.of(phase, "echo")["streams"], &json!(STREAMS));
        wrong.equals("streams in bulk", &self.of(phase, "bulk")["streams"], &json!(BULK_STREAMS));
        wrong.equals("bytes in bulk", &self.of(phase, "bulk")["bytes"], &json!(BULK_STREAMS * BULK_BYTES));
        wrong.equals("streams that closed", &self.of(phase, "closed")["streams"], &json!(STREAMS));
        wrong.faults(self, phase, &["opened", "echo", "bulk", "closed"]);
        wrong.left(self, phase);
        wrong.0.into_iter().map(|wrong| format!("{phase}: {wrong}")).collect()
    }

    /// Faults of the streams that the host has opened through the guest's card.
    pub(crate) fn check_wire(&self) -> Vec<String> {
        let mut wrong = Wrong::default();
        let phase = "wire";
        wrong.equals(
            "what carries them",
            &self.of(phase, "opened")["carried"],
            &json!({ "packet": STREAMS }),
        );
        let queues = &self.of(phase, "ready")["queues"];
        wrong.unless("queues of the card, both ways", queues, queues.as_u64() >= Some(4));
        let counted = self.of(phase, "counted");
        wrong.equals("packets that were dropped", &counted["dropped"], &json!(0.0));
        wrong.equals("bad checksums", &counted["bad_checksums"], &json!(0));
        wrong.left(self, phase);
        wrong.0
    }

    /// The number of packets that the programs have spliced in the phase `wire`.
    pub(crate) fn spliced(&self) -> f64 {
        self.of("wire", "counted")["spliced"].as_f64().unwrap_or_default()
    }

    /// Faults of the streams whose process was killed, and of the next process.
    pub(crate) fn check_killed(&self) -> Vec<String> {
        let mut wrong = Wrong::default();
        let living = match self.kernel.has {
            Has::Tcx | Has::Clsact => STREAMS,
            Has::Relay => 0,
        };
        let phase = "kill";
        wrong.equals("streams without a process", &self.of(phase, "orphaned")["streams"], &json!(living));
        wrong.equals(
            "streams that were adopted",
            &self.of(phase, "adopted")["streams"],
            &json!(living as f64),
        );
        wrong.equals("streams after that", &self.of(phase, "outlived")["streams"], &json!(living));
        wrong.equals("new streams", &self.of(phase, "reopened")["streams"], &json!(MORE));
        wrong.equals("new streams that echoed", &self.of(phase, "echo")["streams"], &json!(MORE));
        wrong.equals("streams that closed", &self.of(phase, "closed")["streams"], &json!(living + MORE));
        wrong.faults(self, phase, &["opened", "outlived", "reopened", "echo", "closed"]);
        wrong.left(self, phase);
        wrong.0
    }

    /// A row of the table. `HEAD` names its cells.
    pub(crate) fn row(&self) -> String {
        let killed = self.of("kill", "orphaned")["streams"].as_u64();
        let killed = match killed {
            Some(0) => "they end".to_owned(),
            Some(STREAMS) => "they go on".to_owned(),
            other => format!("{} of {STREAMS} go on", other.unwrap_or_default()),
        };
        let has_all = self.of("kill", "adopted")["streams"] == json!(STREAMS as f64);
        let adopted = if has_all { "has them; " } else { "" };
        let fresh = match self.of("kill", "echo")["streams"].as_u64() {
            Some(MORE) => "new ones work".to_owned(),
            other => format!("{} of {MORE} new ones work", other.unwrap_or_default()),
        };
        let attached = match &self.of("auto", "opened")["objects"] {
            objects if objects["links"].as_u64() > Some(0) => "tcx",
            objects if objects["filters"].as_u64() > Some(0) => "clsact",
            _ => "-",
        };
        let left = |phase: &str| {
            let mut wrong = Wrong::default();
            wrong.left(self, phase);
            if wrong.0.is_empty() { "nothing" } else { "programs and maps" }
        };
        let cells = [
            self.series(),
            format!("{:?} {}", self.kernel.distribution, self.kernel.suite.trim_end_matches("-updates")),
            self.carried("auto"),
            attached.to_owned(),
            self.carried("sockmap"),
            killed,
            format!("{adopted}{fresh}"),
            left("auto").to_owned(),
            left("kill").to_owned(),
        ];
        format!("| {} |", cells.join(" | "))
    }

    fn carried(&self, phase: &str) -> String {
        let carried = self.of(phase, "opened")["carried"].as_object().cloned().unwrap_or_default();
        if carried.is_empty() {
            return "not tried".to_owned();
        }
        let paths: Vec<_> = carried
            .iter()
            .map(|(path, count)| if *count == STREAMS { path.clone() } else { format!("{path}: {count}") })
            .collect();
        paths.join(", ")
    }
}

/// The faults that were found.
#[derive(Debug, Default)]
struct Wrong(Vec<String>);

impl Wrong {
    fn unless(&mut self, what: &str, found: &Value, is_right: bool) {
        if !is_right {
            self.0.push(format!("{what}: {found}"));
        }
    }

    fn equals(&mut self, what: &str, found: &Value, right: &Value) {
        self.unless(&format!("{what} (should be {right})"), found, found == right);
    }

    fn faults(&mut self, found: &Found<'_>, phase: &str, kinds: &[&str]) {
        for kind in kinds {
            self.equals(&format!("faults of {phase}, {kind}"), &found.of(phase, kind)["faults"], &json!([]));
        }
    }

    /// Checks that a stop leaves nothing.
    fn left(&mut self, found: &Found<'_>, phase: &str) {
        let left = found.of(phase, "left");
        self.equals(&format!("the exit status of {phase}"), &left["status"], &json!(0));
        self.equals(&format!("whether all streams of {phase} ended"), &left["streams_ended"], &json!(true));
        let nothing = json!({ "programs": 0, "maps": 0, "links": 0, "filters": 0 });
        self.equals(&format!("objects after {phase}"), &left["objects"], &nothing);
        for place in ["pins", "sockets"] {
            self.equals(&format!("whether there are {place} after {phase}"), &left[place], &json!(false));
        }
    }
}
