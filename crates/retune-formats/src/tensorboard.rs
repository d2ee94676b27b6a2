//! TensorBoard's event files: numbers by step, which `tensorboard --logdir` draws.
//!
//! A file is a row of records as TensorFlow's `TFRecord` has them (a length, its checksum, the bytes, theirs), and a record an `Event` of
//! `tensorflow/core/util/event.proto`, of which a few fields are written here. A run that goes on after a kill drops what was written beyond
//! its checkpoint, and begins a file of its own, in which a session starts: so TensorBoard, if it looks on, drops the same.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::atomic::{self, io_error};
use crate::error::Error;

const PREFIX: &str = "events.out.tfevents.";
/// Stands where other writers name the machine, which is nobody's business where a run is shared.
const WRITER: &str = ".retune.";
/// Bytes of a record beside its data: a length of 8, and two checksums.
const HEAD: usize = 12;
const TAIL: usize = 4;

/// Whether a file of this name is one that is written here.
pub fn is_own(name: &str) -> bool {
    name.starts_with(PREFIX) && name.contains(WRITER)
}

/// An event file that is being written.
#[derive(Debug)]
pub struct Events {
    file: File,
    path: PathBuf,
}

impl Events {
    /// Begins a file in a folder, after those that are there. What TensorBoard knows of this step and of later ones it forgets.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(folder: &Path, step: u64) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(io_error("write", folder))?;
        let earlier = list(folder)?;
        // Files are read in the order of their names, whatever became of the clock in between.
        let begun = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split('.').next()?.parse().ok();
        let latest = earlier.iter().filter_map(begun).max().unwrap_or(0);
        let seconds = (now() as u64).max(latest);
        let path = folder.join(format!("{PREFIX}{seconds:010}{WRITER}{:04}", earlier.len()));
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(io_error("write", &path))?;
        let mut events = Self { file, path };
        let mut version = Message::event(0);
        version.bytes(FILE_VERSION, b"brain.Event:2");
        events.record(&version.0)?;
        let mut start = Message::default();
        start.number(STATUS, STATUS_START);
        let mut session = Message::event(step);
        session.bytes(SESSION_LOG, &start.0);
        events.record(&session.0)?;
        Ok(events)
    }

    /// Adds the numbers of a step, each under its tag.
    ///
    /// # Errors
    /// [`Error::Io`], such as a full disk.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), Error> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut scalar = Message::default();
            scalar.bytes(TAG, tag.as_bytes());
            scalar.single(SIMPLE_VALUE, *value as f32);
            summary.bytes(VALUE, &scalar.0);
        }
        let mut event = Message::event(step);
        event.bytes(SUMMARY, &summary.0);
        self.record(&event.0)
    }

    fn record(&mut self, data: &[u8]) -> Result<(), Error> {
        self.file.write_all(&framed(data)).map_err(io_error("write", &self.path))
    }
}

/// Drops the events of a folder's files that are not to be kept, by their step and tags, and what a kill left in the middle; a file of which no
/// numbers stay goes whole. Files of other programs are left alone.
///
/// # Errors
/// [`Error::Io`].
pub fn keep(folder: &Path, mut is_kept: impl FnMut(u64, &[String]) -> bool) -> Result<(), Error> {
    for path in list(folder)? {
        let content = fs::read(&path).map_err(io_error("read", &path))?;
        let (mut kept, mut numbers) = (Vec::new(), 0);
        for (record, event) in events(&content) {
            if event.tags.is_empty() || is_kept(event.step, &event.tags) {
                kept.extend_from_slice(record);
                numbers += event.tags.len();
            }
        }
        if numbers == 0 {
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        } else if kept.len() < content.len() {
            atomic::write(&path, &kept)?;
        }
    }
    Ok(())
}

/// The event files of a folder that were written here, in the order of their names.
fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("read", folder)(error)),
    };
    let own = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_own));
    let mut paths: Vec<PathBuf> = own.map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Fields of `Event`.
const WALL_TIME: u8 = 1;
const STEP: u8 = 2;
const FILE_VERSION: u8 = 3;
const SUMMARY: u8 = 5;
const SESSION_LOG: u8 = 7;
/// Of `SessionLog`.
const STATUS: u8 = 1;
const STATUS_START: u64 = 1;
/// Of `Summary`.
const VALUE: u8 = 1;
/// Of `Summary.Value`.
const TAG: u8 = 1;
const SIMPLE_VALUE: u8 = 2;

/// How protocol buffers write a field.
const VARINT: u8 = 0;
const DOUBLE: u8 = 1;
const BYTES: u8 = 2;
const SINGLE: u8 = 5;

/// A protocol buffer that is being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// An event of this moment.
    fn event(step: u64) -> Self {
        let mut event = Self::default();
        event.key(WALL_TIME, DOUBLE);
        event.0.extend(now().to_le_bytes());
        event.number(STEP, step);
        event
    }

    fn key(&mut self, field: u8, kind: u8) {
        self.0.push(field << 3 | kind);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn number(&mut self, field: u8, value: u64) {
        self.key(field, VARINT);
        self.varint(value);
    }

    fn single(&mut self, field: u8, value: f32) {
        self.key(field, SINGLE);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u8, value: &[u8]) {
        self.key(field, BYTES);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }
}

/// What is read of an event.
#[derive(Debug, Default, PartialEq)]
struct Event {
    step: u64,
    tags: Vec<String>,
}

impl Event {
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut event = Self::default();
        for field in fields(bytes) {
            match field? {
                Field { number: STEP, value: Value::Number(step) } => event.step = step,
                Field { number: SUMMARY, value: Value::Bytes(summary) } => {
                    for value in of_field(summary, VALUE) {
                        let tag = of_field(value?, TAG).next()??;
                        event.tags.push(String::from_utf8_lossy(tag).into_owned());
                    }
                }
                _ => {}
            }
        }
        Some(event)
    }
}

/// The whole records of a file up to the first that is damaged, and what they say.
fn events(mut rest: &[u8]) -> impl Iterator<Item = (&[u8], Event)> {
    std::iter::from_fn(move || {
        let (head, after) = rest.split_at_checked(HEAD)?;
        let length = u64::from_le_bytes(head.get(..8)?.try_into().ok()?);
        let data = after.get(..usize::try_from(length).ok()?)?;
        let record = rest.get(..HEAD + data.len() + TAIL)?;
        if record != framed(data) {
            return None;
        }
        rest = rest.get(record.len()..)?;
        Some((record, Event::read(data)?))
    })
}

/// Data as a record.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), data, &masked(data)].concat()
}

/// The checksum of a record's part: CRC-32C, turned and shifted so that a checksum of bytes that hold checksums stays of use.
fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// CRC-32C (Castagnoli), bit by bit: a run writes some hundred bytes a step.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let bit = |sum: u32, _| if sum & 1 == 1 { sum >> 1 ^ POLYNOMIAL } else { sum >> 1 };
    !bytes.iter().fold(!0, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), bit))
}

/// A field of a protocol buffer.
struct Field<'a> {
    number: u8,
    value: Value<'a>,
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a protocol buffer; the last is `None` where its bytes are none.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = Option<Field<'_>>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let field = field(&mut rest);
        if field.is_none() {
            rest = &[];
        }
        Some(field)
    })
}

fn field<'a>(rest: &mut &'a [u8]) -> Option<Field<'a>> {
    let mut take = |count: usize| {
        let (taken, after) = rest.split_at_checked(count)?;
        *rest = after;
        Some(taken)
    };
    let varint = |take: &mut dyn FnMut(usize) -> Option<&'a [u8]>| {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = *take(1)? else { return None };
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    };
    let key = varint(&mut take)?;
    let value = match (key & 7) as u8 {
        VARINT => Value::Number(varint(&mut take)?),
        DOUBLE => Value::Bytes(take(8)?),
        SINGLE => Value::Bytes(take(4)?),
        BYTES => {
            let length = usize::try_from(varint(&mut take)?).ok()?;
            Value::Bytes(take(length)?)
        }
        _ => return None,
    };
    Some(Field { number: u8::try_from(key >> 3).ok()?, value })
}

/// The fields of a number that are bytes.
fn of_field(bytes: &[u8], number: u8) -> impl Iterator<Item = Option<&[u8]>> {
    fields(bytes).filter_map(move |field| match field {
        None => Some(None),
        Some(Field { number: found, value: Value::Bytes(value) }) if found == number => Some(Some(value)),
        Some(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, steps: std::ops::RangeInclusive<u64>) {
        let mut events = Events::create(folder, *steps.start()).unwrap();
        for step in steps {
            events.scalars(step, &[("train/loss", 2.0), ("train/learning_rate", 0.5)]).unwrap();
            if step.is_multiple_of(10) {
                events.scalars(step, &[("eval/loss", 1.0)]).unwrap();
            }
        }
    }

    /// The steps and first tags of all files, one after another.
    fn found(folder: &Path) -> Vec<(u64, String)> {
        let mut found = Vec::new();
        for path in list(folder).unwrap() {
            let content = fs::read(path).unwrap();
            let numbers = events(&content).filter(|(_, event)| !event.tags.is_empty());
            found.extend(numbers.map(|(_, event)| (event.step, event.tags[0].clone())));
        }
        found
    }

    #[test]
    fn checksums_are_those_of_the_format() {
        // The check value of CRC-32C in the catalogue of parametrised CRC algorithms.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        // The head of a record of 24 bytes, which every file of TensorFlow's begins with: its version.
        assert_eq!(masked(&24u64.to_le_bytes()), [0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn a_file_begins_with_its_version_and_a_session() {
        let folder = tempfile::tempdir().unwrap();
        Events::create(folder.path(), 300).unwrap();
        let [path] = list(folder.path()).unwrap().try_into().unwrap();
        let content = fs::read(path).unwrap();
        let read: Vec<(&[u8], Event)> = events(&content).collect();
        assert_eq!(read.iter().map(|(_, event)| event.step).collect::<Vec<_>>(), [0, 300]);
        assert!(read[0].0.windows(13).any(|bytes| bytes == b"brain.Event:2"));
        assert!(read[1].0.ends_with(&framed(&read[1].0[HEAD..read[1].0.len() - TAIL])[HEAD..]));
        assert!(read[1].0.windows(4).any(|bytes| bytes == [SESSION_LOG << 3 | BYTES, 2, STATUS << 3, 1]));
    }

    #[test]
    fn a_run_that_goes_on_has_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("events.out.tfevents.0000000001.elsewhere.1.0");
        fs::write(&other, b"another program's").unwrap();
        write(folder.path(), 1..=25);
        let path = list(folder.path()).unwrap().remove(0);
        let whole = fs::read(&path).unwrap();
        // A kill in the middle of a record.
        fs::write(&path, &whole[..whole.len() - 7]).unwrap();
        keep(folder.path(), |step, tags| step < 20 || (step == 20 && tags == ["train/loss", "train/learning_rate"]))
            .unwrap();
        let mut events = Events::create(folder.path(), 21).unwrap();
        events.scalars(20, &[("eval/loss", 1.0)]).unwrap();
        drop(events);
        assert_eq!(list(folder.path()).unwrap().len(), 2);
        let steps = found(folder.path());
        let of = |tag: &str| steps.iter().filter(|(_, found)| found == tag).map(|(step, _)| *step).collect::<Vec<_>>();
        assert_eq!(of("train/loss"), (1..=20).collect::<Vec<_>>());
        assert_eq!(of("eval/loss"), [10, 20]);
        // Of a run that starts anew nothing stays, but what is somebody else's.
        keep(folder.path(), |_, _| false).unwrap();
        assert_eq!((list(folder.path()).unwrap().len(), fs::read(other).unwrap()), (0, b"another program's".to_vec()));
    }

    #[test]
    fn bytes_that_are_no_events_end_a_file() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 1..=3);
        let path = list(folder.path()).unwrap().remove(0);
        let whole = fs::read(&path).unwrap();
        let count = |content: &[u8]| events(content).count();
        assert_eq!(count(&whole), 5);
        for length in 0..whole.len() {
            assert!(count(&whole[..length]) < 5, "{length} bytes");
            let mut damaged = whole.clone();
            damaged[length] ^= 0x10;
            assert!(count(&damaged) < 5, "byte {length}");
        }
        assert_eq!(count(&[&framed(&[0xff; 20])[..], &whole].concat()), 0, "a record that is no event");
        assert_eq!(count(&u64::MAX.to_le_bytes().repeat(4)), 0);
    }
}
