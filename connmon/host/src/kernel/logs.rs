//! The programs' own diagnostics (aya-log) → the agent's log, at debug
//! whatever their own level.

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};

/// Log target of the programs.
const TARGET: &str = "connmon::kernel::program";

/// Reads the log ring.
pub struct ProgramLog(EbpfLogger<AtDebug>);

impl std::fmt::Debug for ProgramLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProgramLog")
    }
}

impl ProgramLog {
    /// `None` when the object logs nothing.
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
