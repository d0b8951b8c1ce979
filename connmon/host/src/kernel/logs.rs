//! Copies the programs' own diagnostics (aya-log) to the agent's log, at level
//! debug.

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};

/// Log target of the programs.
const TARGET: &str = "connmon::kernel::program";

/// Reads the ring buffer of aya-log.
pub struct ProgramLog(EbpfLogger<AtDebug>);

impl ProgramLog {
    /// `None` if the object logs nothing.
    pub fn new(ebpf: &mut Ebpf) -> Option<Self> {
        EbpfLogger::init_with_logger(ebpf, AtDebug).ok().map(Self)
    }

    /// Logs what was written since the last call.
    pub fn flush(&mut self) {
        self.0.flush();
    }
}

struct AtDebug;

impl Log for AtDebug {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        log::logger().log(
            &Record::builder()
                .level(Level::Debug)
                .target(TARGET)
                .args(*record.args())
                .build(),
        );
    }

    fn flush(&self) {}
}
