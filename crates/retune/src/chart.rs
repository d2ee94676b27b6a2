//! The chart of the loss that a terminal shows while a run trains, in Braille's dots: two beside each other and four above each other in a letter.

/// Lines of letters.
const HEIGHT: usize = 5;
/// Letters of a line at most: more would tell no more.
const WIDEST: usize = 64;
/// Letters below which there is no chart.
const NARROWEST: usize = 16;
/// Letters of the numbers beside it.
const LABEL: usize = 7;
/// What stands for a score of held-out rows.
const SCORE: char = '●';

/// The losses of a run, over the steps that it will take.
pub struct Chart {
    /// Steps of the whole run.
    steps: u64,
    /// For each column of dots the losses that fall into it: their sum and number.
    columns: Vec<(f64, u64)>,
    /// Held-out losses, each with its column.
    scores: Vec<(usize, f64)>,
}

impl Chart {
    /// An empty one for a terminal that is so wide; none where that is too narrow.
    pub fn new(steps: u64, terminal_width: usize) -> Option<Self> {
        let width = terminal_width.saturating_sub(LABEL + 3).min(WIDEST);
        (width >= NARROWEST && steps > 1).then(|| Self {
            steps,
            columns: vec![(0.0, 0); 2 * width],
            scores: Vec::new(),
        })
    }

    /// The column of dots of a step.
    fn column(&self, step: u64) -> usize {
        let last = self.columns.len() as u64 - 1;
        (step.saturating_sub(1).saturating_mul(last) / (self.steps - 1)).min(last) as usize
    }

    /// Takes the loss of a step, counted from 1.
    pub fn loss(&mut self, step: u64, loss: f64) {
        let column = self.column(step);
        let (sum, count) = &mut self.columns[column];
        (*sum, *count) = (*sum + loss, *count + 1);
    }

    /// Takes the held-out loss after a step.
    pub fn score(&mut self, step: u64, loss: f64) {
        self.scores.push((self.column(step), loss));
    }

    /// The chart in lines, with the largest and the least loss at its side; nothing before the first loss.
    pub fn draw(&self) -> String {
        let means = self.columns.iter().enumerate().filter(|(_, (_, count))| *count > 0);
        let means: Vec<(usize, f64)> = means.map(|(column, (sum, count))| (column, sum / *count as f64)).collect();
        let all = || means.iter().chain(&self.scores).map(|point| point.1);
        let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
        if means.is_empty() || !(high - low).is_finite() {
            return String::new();
        }
        // Counted from above.
        let row = |loss: f64| match high > low {
            true => ((high - loss) / (high - low) * (4 * HEIGHT - 1) as f64).round() as usize,
            false => 2 * HEIGHT,
        };
        let mut dots = Dots::new(self.columns.len() / 2);
        let mut before: Option<(usize, usize)> = None;
        for (column, loss) in means {
            let at = (column, row(loss));
            dots.line(before.unwrap_or(at), at);
            before = Some(at);
        }
        let mut lines = dots.letters();
        for (column, loss) in &self.scores {
            lines[row(*loss) / 4][column / 2] = SCORE;
        }
        let last = lines.len() - 1;
        let label = |place: usize| match place {
            0 => format!("{high:LABEL$.3}"),
            place if place == last => format!("{low:LABEL$.3}"),
            _ => " ".repeat(LABEL),
        };
        let lines = lines.iter().enumerate().map(|(place, letters)| {
            let letters: String = letters.iter().collect();
            format!("{} {}", label(place), letters.trim_end_matches('\u{2800}'))
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// Dots that are set, letter by letter.
struct Dots(Vec<Vec<u8>>);

impl Dots {
    fn new(width: usize) -> Self {
        Self(vec![vec![0; width]; HEIGHT])
    }

    fn set(&mut self, (column, row): (usize, usize)) {
        // The bits of Unicode's Braille patterns: the fourth row came later than the others.
        const BITS: [[u8; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];
        self.0[row / 4][column / 2] |= BITS[row % 4][column % 2];
    }

    /// From one dot to another that is not left of it, without a gap.
    fn line(&mut self, from: (usize, usize), to: (usize, usize)) {
        let (across, mut last) = (to.0 - from.0, from.1);
        for step in 0..=across {
            let part = if across == 0 { 1.0 } else { step as f64 / across as f64 };
            let row = (from.1 as f64 + part * (to.1 as f64 - from.1 as f64)).round() as usize;
            let rise = if row > last { last + 1..=row } else { row..=last.saturating_sub(1).max(row) };
            for between in rise {
                self.set((from.0 + step, between));
            }
            last = row;
        }
    }

    fn letters(&self) -> Vec<Vec<char>> {
        let letter = |bits: &u8| char::from_u32(0x2800 + u32::from(*bits)).unwrap_or(' ');
        self.0.iter().map(|line| line.iter().map(letter).collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_loss_falls_over_the_whole_width() {
        let mut chart = Chart::new(33, 28).unwrap();
        assert_eq!(chart.draw(), "");
        for step in 1..=33 {
            chart.loss(step, 4.0 - 3.0 * (step - 1) as f64 / 32.0);
        }
        chart.score(33, 4.0);
        let drawn = chart.draw();
        let lines: Vec<Vec<char>> = drawn.lines().map(|line| line.chars().skip(LABEL + 1).collect()).collect();
        // It begins above on the left, ends below on the right, and has no gap.
        assert!(lines[0][0] != '\u{2800}' && lines[4].len() == 18, "{drawn}");
        for column in 0..18 {
            assert!(lines.iter().any(|line| line.get(column).is_some_and(|letter| *letter != '\u{2800}')), "{drawn}");
        }
        assert_eq!(lines[0].last(), Some(&SCORE));
        assert!(drawn.starts_with("  4.000 ") && drawn.contains("\n  1.000 "), "{drawn}");
    }

    #[test]
    fn what_has_come_so_far_takes_its_part_of_the_width() {
        let mut chart = Chart::new(1000, 200).unwrap();
        for step in 1..=500 {
            chart.loss(step, 2.0);
        }
        let drawn = chart.draw();
        let longest = drawn.lines().map(|line| line.chars().count()).max().unwrap();
        assert!((LABEL + 1 + WIDEST / 2..=LABEL + 2 + WIDEST / 2).contains(&longest), "{longest}\n{drawn}");
        // More steps than columns, and fewer, and numbers that are none.
        let mut chart = Chart::new(3, 40).unwrap();
        chart.loss(1, 2.0);
        chart.loss(3, f64::NAN);
        chart.score(9, 1.0);
        assert!(chart.draw().contains(SCORE));
    }

    #[test]
    fn where_there_is_no_room_there_is_no_chart() {
        assert!(Chart::new(100, 20).is_none() && Chart::new(1, 80).is_none() && Chart::new(100, 80).is_some());
    }
}
