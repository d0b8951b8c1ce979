//! The terminal of `top`: raw mode, the alternate screen, key presses.

use std::fs::File;
use std::io::{self, IsTerminal, Write, stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use crossterm::{cursor, execute, queue, style, terminal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, kill_current_process_group};
use rustix::termios::tcgetwinsize;
use signal_hook::consts::SIGCONT;

use super::columns::fit;
use super::stop::Stop;

/// A key that means something to a tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A printable ASCII character.
    Char(char),
    /// Tab.
    Tab,
    /// Ctrl-Z.
    Suspend,
    /// Escape or Ctrl-C.
    End,
}

/// Reads key presses. Level-triggered: whatever is not read yet ends the next
/// wait at once, however it came. (crossterm's event source is edge-triggered
/// and lost the key that arrived together with a change of the window.)
#[derive(Debug)]
pub struct Keyboard(OwnedFd);

impl Keyboard {
    /// The terminal on stdin, else the controlling one.
    ///
    /// # Errors
    /// Without either.
    pub fn open() -> io::Result<Self> {
        let stdin = stdin();
        Ok(Self(if stdin.is_terminal() {
            stdin.as_fd().try_clone_to_owned()?
        } else {
            File::open("/dev/tty")?.into()
        }))
    }

    /// The keys that were pressed, waiting for the first one so long.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn keys(&self, wait: Duration) -> io::Result<Vec<Key>> {
        let mut typed = [0; 64];
        if !self.readable(wait)? {
            return Ok(Vec::new());
        }
        let mut length = rustix::io::read(&self.0, &mut typed)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // The rest of an arrow's sequence may be a packet behind.
        if typed[length - 1] == ESCAPE && length < typed.len() && self.readable(SEQUENCE_WAIT)? {
            length += rustix::io::read(&self.0, &mut typed[length..])?;
        }
        Ok(parse(&typed[..length]))
    }

    fn readable(&self, wait: Duration) -> io::Result<bool> {
        let timeout = Timespec::try_from(wait).map_err(io::Error::other)?;
        let mut waited = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut waited, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            // The signal that ends us, say: the caller looks.
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

const CTRL_C: u8 = 3;
const CTRL_Z: u8 = 0x1a;
const ESCAPE: u8 = 0x1b;

/// Between the bytes of one escape sequence, over a slow line.
const SEQUENCE_WAIT: Duration = Duration::from_millis(50);

/// What a terminal in raw mode sends → keys. Arrows and their like, escape
/// sequences, mean nothing here.
fn parse(typed: &[u8]) -> Vec<Key> {
    let mut keys = Vec::new();
    let mut rest = typed.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        match byte {
            CTRL_C => keys.push(Key::End),
            CTRL_Z => keys.push(Key::Suspend),
            ESCAPE => match rest.next_if(|next| matches!(next, b'[' | b'O')) {
                // ECMA-48: parameters, then one final byte.
                Some(_) => {
                    while rest
                        .next()
                        .is_some_and(|byte| !(0x40..=0x7e).contains(&byte))
                    {}
                }
                None => keys.push(Key::End),
            },
            b'\t' => keys.push(Key::Tab),
            b' '..=b'~' => keys.push(Key::Char(byte.into())),
            _ => {}
        }
    }
    keys
}

/// Columns and rows of a terminal that reports none, as serial consoles do.
const USUAL_SIZE: (u16, u16) = (80, 24);

/// Columns and rows.
pub fn size() -> (u16, u16) {
    let reported = tcgetwinsize(stdout()).map_or((0, 0), |size| (size.ws_col, size.ws_row));
    usual_where_zero(reported)
}

fn usual_where_zero((columns, rows): (u16, u16)) -> (u16, u16) {
    let (usual_columns, usual_rows) = USUAL_SIZE;
    (
        if columns == 0 { usual_columns } else { columns },
        if rows == 0 { usual_rows } else { rows },
    )
}

/// What is shown, left again however the program ends.
#[derive(Debug)]
pub enum Screen {
    /// Raw mode and the alternate screen.
    Full {
        /// Whether the terminal is in that state.
        entered: bool,
        /// SIGCONT has come.
        continued: Arc<AtomicBool>,
    },
    /// One refresh below the other, without escape sequences.
    Plain,
}

impl Screen {
    /// Enters; `plain` for a terminal without escape sequences.
    ///
    /// # Errors
    /// Without a terminal.
    pub fn enter(plain: bool) -> anyhow::Result<Self> {
        if plain {
            return Ok(Self::Plain);
        }
        let continued = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(SIGCONT, Arc::clone(&continued))
            .context("cannot handle SIGCONT")?;
        let mut screen = Self::Full {
            entered: false,
            continued,
        };
        screen.set_up()?;
        Ok(screen)
    }

    fn set_up(&mut self) -> anyhow::Result<()> {
        if let Self::Full { entered, continued } = self {
            continued.store(false, Ordering::Relaxed);
            terminal::enable_raw_mode().context("cannot set up the terminal")?;
            *entered = true;
            execute!(stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        }
        Ok(())
    }

    fn restore(&mut self) {
        if let Self::Full { entered, .. } = self
            && std::mem::take(entered)
        {
            // Nothing better can be done for a terminal that is gone.
            let _ = execute!(stdout(), cursor::Show, terminal::LeaveAlternateScreen);
            let _ = terminal::disable_raw_mode();
        }
    }

    /// Stops the job, as Ctrl-Z does where the terminal handles it, and comes
    /// back when it is continued. In raw mode the key is a byte like others.
    /// The kernel ignores SIGTSTP where no shell could continue the job.
    ///
    /// # Errors
    /// When the terminal cannot be set up again.
    pub fn suspend(&mut self, stop: &Stop) -> anyhow::Result<()> {
        self.restore();
        kill_current_process_group(Signal::TSTP).context("cannot stop the job")?;
        self.resume(stop)
    }

    /// Whether the process was continued after a stop that it did not see
    /// coming (SIGSTOP): the shell has changed the terminal meanwhile.
    ///
    /// # Errors
    /// When the terminal cannot be set up again.
    pub fn was_continued(&mut self, stop: &Stop) -> anyhow::Result<bool> {
        let continued = match self {
            Self::Full { continued, .. } => continued.load(Ordering::Relaxed),
            Self::Plain => false,
        };
        if continued {
            self.restore();
            self.resume(stop)?;
        }
        Ok(continued)
    }

    /// Sets up again, unless the program is to end: in the background that
    /// would stop it once more.
    fn resume(&mut self, stop: &Stop) -> anyhow::Result<()> {
        if stop.requested() {
            return Ok(());
        }
        self.set_up()
    }

    /// Shows the lines, as many and as much of them as fit.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn show(&self, lines: &[String], size: (u16, u16)) -> io::Result<()> {
        let mut out = stdout().lock();
        match self {
            Self::Full { .. } => draw(&mut out, lines, size)?,
            Self::Plain => print(&mut out, lines, size)?,
        }
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Every line at its place. Nothing here can make the terminal scroll.
fn draw(out: &mut impl Write, lines: &[String], (columns, rows): (u16, u16)) -> io::Result<()> {
    queue!(out, terminal::BeginSynchronizedUpdate)?;
    for row in 0..rows {
        let line = lines.get(usize::from(row)).map_or("", String::as_str);
        // Cleared first: after a line that fills its row, some terminals
        // would clear its last character.
        queue!(
            out,
            cursor::MoveTo(0, row),
            terminal::Clear(terminal::ClearType::UntilNewLine),
            style::Print(fit(line, usize::from(columns))),
        )?;
    }
    queue!(out, terminal::EndSynchronizedUpdate)
}

fn print(out: &mut impl Write, lines: &[String], (columns, rows): (u16, u16)) -> io::Result<()> {
    // The empty line is one of the rows.
    for line in lines.iter().take(usize::from(rows - 1)) {
        writeln!(out, "{}", fit(line, usize::from(columns)))?;
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_keys_and_sequences_are_none() {
        let keys = [Key::Char('p'), Key::Tab, Key::Char(' '), Key::End];
        assert_eq!(parse(b"p\t \x03"), keys);
        assert_eq!(parse(b"\x1b"), [Key::End]);
        assert_eq!(parse(b"\x1a"), [Key::Suspend]);
        // Up, F1, Shift-Right and a letter after them.
        assert_eq!(parse(b"\x1b[A\x1bOP\x1b[1;2Cr"), [Key::Char('r')]);
        assert_eq!(parse("ö\r\n".as_bytes()), []);
    }

    #[test]
    fn a_terminal_without_a_size_has_the_usual_one() {
        for (reported, size) in [
            ((0, 0), (80, 24)),
            ((0, 50), (80, 50)),
            ((132, 0), (132, 24)),
            ((1, 1), (1, 1)),
        ] {
            assert_eq!(usual_where_zero(reported), size);
        }
    }

    #[test]
    fn drawing_stays_within_the_window() {
        let lines: Vec<String> = (0..9).map(|n| format!("{n} 日本語")).collect();
        for rows in [1, 2, 3, 4, 9, 20] {
            let mut out = Vec::new();
            draw(&mut out, &lines, (5, rows)).unwrap();
            let text = String::from_utf8(out).unwrap();
            assert!(!text.contains(['\n', '\r']), "{text:?}");
            // One-based; the last row is cleared even when nothing is in it.
            assert!(text.contains(&format!("\x1b[{rows};1H")), "{text:?}");
            assert!(!text.contains(&format!("\x1b[{};1H", rows + 1)), "{text:?}");
            assert!(text.contains("0 日") && !text.contains("日本"), "{text:?}");
        }
    }

    #[test]
    fn a_plain_refresh_is_lines_alone() {
        let lines = ["title".to_owned(), "日本語".to_owned(), "last".to_owned()];
        for (rows, expected) in [
            (24, "title\n日本\nlast\n\n"),
            (3, "title\n日本\n\n"),
            (1, "\n"),
        ] {
            let mut out = Vec::new();
            print(&mut out, &lines, (5, rows)).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_not_read_yet_ends_the_next_wait() {
        let (ours, mut theirs) = io::pipe().unwrap();
        let keyboard = Keyboard(ours.into());
        assert_eq!(keyboard.keys(Duration::ZERO).unwrap(), []);
        theirs.write_all(&[b'x'; 65]).unwrap();
        let long = Duration::from_secs(60);
        assert_eq!(keyboard.keys(long).unwrap().len(), 64);
        assert_eq!(keyboard.keys(long).unwrap(), [Key::Char('x')]);
        drop(theirs);
        let gone = keyboard.keys(long).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    }
}
