// Package guestfs knows what a guest keeps on its disk: its partition tables,
// and which bytes of the disk nobody needs.
//
// Free looks at a whole disk: at each partition, or at a filesystem or LVM
// volume directly on the disk. Its answer is the set of byte ranges that are
// proven free, and for everything that was not judged the reason, as a code
// for programs (package freespace) and a text. The readers of the single
// filesystems are packages of their own below this one, each a
// freespace.Reader.
//
// Design note. A guest wrote these bytes, so they are hostile: every count,
// sum and link is checked before it is used, chains are bounded and loops
// found. The functions read through an io.ReaderAt and know nothing of image
// formats. A structure that is not there is no error; one that is there and
// damaged is, with its place, and is never half believed.
//
// What is called free may be thrown away by the caller, so everything rests on
// one rule: unknown feature flags, recorded errors, a wrong checksum, a count
// that does not match or any other doubt means that the whole filesystem is
// used. Two signatures in one place are such a doubt. A refusal is no error of
// Free: the other partitions are still judged.
//
// Memory is bounded by the number of ranges that the caller permits and by
// constants of the readers, never by a number found in the image.
package guestfs
