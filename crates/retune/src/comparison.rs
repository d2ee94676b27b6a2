//! A comparison of ways to adapt one model: its folder, its rows, its runs, and what they say.
//!
//! `folder.rs` has the files, `rows.rs` what is trained on and what is held out, `neutral.rs` what nothing is trained on and all may forget, `child.rs` a run of this program as a process of its own, `runs.rs` what
//! is run for a variant and what is kept of it, `decide.rs` what depends on the machine: whether full fine-tuning fits, how many steps fit into given minutes. Of all runs together `scores.rs` has what they made
//! of each row, `results.rs` every number there is to tell, `answer.rs` the three sentences, `table.rs` what the terminal shows; `report.rs` with
//! `report.html` makes the page.

pub mod answer;
pub mod child;
pub mod decide;
pub mod folder;
pub mod neutral;
pub mod report;
pub mod results;
pub mod rows;
pub mod runs;
pub mod scores;
pub mod table;
