// Package rewrite makes images smaller in place: the planner and the executor
// behind image-compact.
//
// Design note. The work is cut in two. A format (layers.Relocator) knows how to
// move what lies at the end of its file into holes, and how to do so without a
// moment at which a power cut loses anything. This package knows what is not
// needed any more and in which order to go:
//
//  1. guest-free: whole clusters that guestfs proved free are dropped. Where
//     something lies below that is not zero they become zero clusters; a
//     format without such (qcow2 version 2, ploop) keeps them.
//  2. zeros: stored clusters that hold nothing but zeros, likewise.
//  3. same-as-parent, on request: clusters equal to what lies below are
//     unmapped.
//  4. leaks: what is counted and referenced by nothing is freed.
//  5. tail: what is left at the end of the file is pulled into the holes, the
//     tables that are not needed any more are dropped, the file is cut off.
//
// Each step leaves a consistent image and can be the last one.
//
// One layer is worked on, the top one unless Options.Layer says otherwise. A
// layer that other images stand on is not touched, except that those above it in
// the same stack are known, and nothing else stands on any of them: then only
// what is free for the guest in every view above it, too, is dropped. (A snapshot taken of a running guest has data
// in the lower layer whose metadata only the upper one knows.)
//
// A record beside the image says that a run has begun and with which options.
// Nothing in it is needed for the content: the image is consistent at every
// moment. It is there so that an interrupted run is noticed, and either
// continued (Resume) or given up (Abandon, which frees what the interrupted
// batch left).
//
// Memory: sets of host clusters are compressed bitmaps (one bit for a cluster
// at worst, 32 MiB for 16 TiB in clusters of 64 KiB), references are collected
// for as many clusters at a time as fit into Relocation.Memory, and metadata is
// read through the layers.Cache.
package rewrite
